"""Figures of robustness: curves over the budget, the norm x method matrix, the union."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sg_lightning._optional import require
from sg_lightning.reporting import provenance, style, summary
from sg_lightning.reporting.summary import Results
from sg_lightning.threats.base import parse_eps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES = (0, (4, 2))


def accuracy_curves(results: Results) -> Figure:
    """Draw accuracy over the size of the perturbation: one panel per norm, one line per method.

    Solid lines with 95 % Wilson bands are the worst case over the attacks; dashed lines are random perturbations of
    the same size; the dotted vertical line marks the headline budget.

    Args:
        results: One result per method, by name.

    Raises:
        ValueError: ``results`` is empty.
        ImportError: matplotlib is not installed.
    """
    summary.check_results(results)
    panels = summary.norms(results)
    across = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    down = -(-len(panels) // across)
    figure = style.new_figure(max(4.9 * across, 6.5), 3.2 * down + 0.5)
    for i, norm in enumerate(panels):
        axes = figure.add_subplot(down, across, i + 1)
        unit = provenance.unit(results, norm)
        style.dress(axes, f"{style.norm_label(norm)} perturbations", f"ε, {unit}" if unit else "ε", "accuracy (%)")
        _draw_norm(axes, results, norm)
    style.legend(figure, _curve_handles(results), columns=6)
    return figure


def _draw_norm(axes: Axes, results: Results, norm: str) -> None:
    ticks: dict[float, str] = {0.0: "0"}
    for name, look in style.looks(results).items():
        result = results[name]
        if norm not in summary.norms({name: result}):
            continue
        eps, share, low, high = (list(values) for values in zip(*result.curve(norm), strict=True))
        hundred = [[100 * v for v in values] for values in (share, low, high)]
        axes.fill_between(eps, hundred[1], hundred[2], color=look.colour, alpha=0.13, linewidth=0)
        axes.plot(
            eps,
            hundred[0],
            color=look.colour,
            marker=look.marker,
            linewidth=2,
            markersize=5.5,
            label=name,
            clip_on=False,
        )
        control = summary.random_curve(result, norm)
        axes.plot(
            [e for e, _ in control], [100 * v for _, v in control], color=look.colour, linestyle=DASHES, linewidth=1.2,
            label=f"{name}, random",
        )  # fmt: skip
        ticks |= summary.budgets(result, norm)
        axes.axvline(parse_eps(summary.headline(result, norm)), color=style.SOFT, linestyle=":", linewidth=1.2)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_ylim(-2, 102)
    axes.set_xlim(0, max(ticks) * 1.04)


def _curve_handles(results: Results) -> list[object]:
    line = require("matplotlib.lines", "report", "drawing a report").Line2D
    return [
        *(
            line([], [], color=look.colour, marker=look.marker, linewidth=2, label=style.plain(name))
            for name, look in style.looks(results).items()
        ),
        line([], [], color=style.SOFT, linestyle=DASHES, linewidth=1.2, label="random, same size"),
        line([], [], color=style.SOFT, linestyle=":", linewidth=1.2, label="headline ε"),
    ]


def norm_matrix(results: Results) -> Figure:
    """Draw the norm x method matrix: accuracies at the headline budgets, with clean, weakest norm and union.

    Args:
        results: One result per method, by name.

    Raises:
        ValueError: ``results`` is empty.
        ImportError: matplotlib is not installed.
    """
    summary.check_results(results)
    columns, names = summary.columns(results), list(results)
    cells = [[summary.cell(results[name], column.key) for column in columns] for name in names]
    colours = require("matplotlib.colors", "report", "drawing a report")
    shades = colours.LinearSegmentedColormap.from_list("sheet", ["#f6f9fc", "#b9d8ea", "#6fb0d6", "#0b4a7d"])

    longest = max(len(name) for name in names)
    figure = style.new_figure(1.25 * len(columns) + 0.09 * longest + 1.2, 0.62 * len(names) + 1.3)
    axes = figure.add_subplot()
    values = [[float("nan") if share is None else 100 * share.value for share in row] for row in cells]
    image = axes.imshow(values, cmap=shades, vmin=0, vmax=100, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            best = len(names) > 1 and value == max((r[j] for r in values if not math.isnan(r[j])), default=None)
            axes.text(
                j, i, "–" if math.isnan(value) else f"{value:.1f}", ha="center", va="center", fontsize=11.5,
                color="white" if value > 72 else style.INK, fontweight="bold" if best else "normal",
            )  # fmt: skip
    heads = [c.label.replace(" (", "\n(") if c.eps else c.label.replace(" ", "\n") for c in columns]
    heads = [head.replace(": ", ":\n") for head in heads]  # of one modality
    labels = [f"{head}\nε = {c.eps}" if c.eps else head for head, c in zip(heads, columns, strict=True)]
    style.dress(axes, grid=None)
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(columns)), [style.plain(label) for label in labels], fontsize=10)
    axes.set_yticks(range(len(names)), [style.plain(name) for name in names], fontsize=10.5)
    axes.tick_params(length=0)
    # White rules between the cells; a wider one sets what is derived (weakest, union) and the clean column apart.
    for i in range(1, len(names)):
        axes.axhline(i - 0.5, color="white", linewidth=2)
    for j in range(1, len(columns)):
        axes.axvline(j - 0.5, color="white", linewidth=9 if j in (1, len(columns) - 2) else 2)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=14, ticks=[0, 25, 50, 75, 100])
    bar.set_label("accuracy (%)", fontsize=9, color=style.SOFT)
    bar.ax.tick_params(labelsize=8.5, colors=style.SOFT, length=0)
    bar.outline.set_visible(False)
    return figure


def union_bars(results: Results) -> Figure:
    """Draw the union accuracy of each method with its 95 % interval, beside its clean and weakest-norm accuracy.

    Args:
        results: One result per method, by name.

    Raises:
        ValueError: ``results`` is empty.
        ImportError: matplotlib is not installed.
    """
    summary.check_results(results)
    names = list(results)
    figure = style.new_figure(9.6, 0.62 * len(names) + 1.5)
    axes = figure.add_subplot()
    style.dress(axes, x="accuracy (%)", grid="x")
    for row, (name, look) in enumerate(style.looks(results).items()):
        union, weakest, clean = (summary.cell(results[name], key) for key in ("union", "min", "clean"))
        assert union is not None
        assert weakest is not None
        assert clean is not None
        value, low, high = (100 * v for v in union)
        axes.barh(row, value, height=0.58, color=look.colour, label=name)
        axes.errorbar(
            value, row, xerr=[[value - low], [high - value]], color=style.INK, capsize=4, linewidth=1.4, fmt="none"
        )
        axes.plot(100 * weakest.value, row, "o", markersize=7, markerfacecolor="white", markeredgecolor=style.INK)
        axes.plot(100 * clean.value, row, "D", markersize=6.5, color=style.INK)
        axes.text(
            1.015, row, f"{value:.1f}", transform=axes.get_yaxis_transform(), va="center", fontsize=11,
            fontweight="bold", color=style.INK,
        )  # fmt: skip
        axes.text(
            1.075, row, f"{low:.1f}–{high:.1f}", transform=axes.get_yaxis_transform(), va="center", fontsize=9.5,
            color=style.SOFT,
        )  # fmt: skip
    axes.set_yticks(range(len(names)), [style.plain(name) for name in names], fontsize=10.5)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xlim(0, 101)
    axes.tick_params(axis="y", length=0)
    patch = require("matplotlib.patches", "report", "drawing a report").Patch
    line = require("matplotlib.lines", "report", "drawing a report").Line2D
    style.legend(
        figure,
        [
            patch(color=style.SOFT, label="union of all norms, 95 % interval"),
            line([], [], marker="o", linestyle="", color=style.INK, markerfacecolor="white", label="weakest norm"),
            line([], [], marker="D", linestyle="", color=style.INK, label="clean"),
        ],
    )
    return figure
