"""Figures of what training did: to the input gradient, and over the epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from sg_lightning._optional import require
from sg_lightning.reporting import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

GradientMetrics: TypeAlias = Mapping[str, Mapping[str, "Tensor"]]
Histories: TypeAlias = Mapping[str, Mapping[str, Sequence[float]]]

PANELS = (
    ("l1", "‖g‖₁ (size: L∞ damage to first order)", True),
    ("l1_over_l2", "‖g‖₁ / ‖g‖₂ (lower is sparser)", False),
    ("hoyer", "Hoyer sparsity (higher is sparser)", False),
)


def measured(metrics: Mapping[str, Tensor], key: str) -> np.ndarray:
    """Return one measure of the samples whose gradient is finite and not zero everywhere (the others have no shape).

    Raises:
        ValueError: the measure is missing.
    """
    missing = {key, "l1"} - set(metrics)
    if missing:
        raise ValueError(
            f"gradient_metrics lacks {sorted(missing)}: give what input_gradient_metrics(forward, x, y) returns, got "
            f"{sorted(metrics)}"
        )
    values, size = (np.asarray(metrics[name].detach().cpu().double()) for name in (key, "l1"))
    return values[np.isfinite(size) & (size > 0)]


def gradient_sparsity_figure(gradient_metrics: GradientMetrics) -> Figure:
    """Draw how the size and the sparsity of the input gradient are distributed over samples, per method.

    Each shape is the distribution over samples, the bar in it the middle half, the dot the median. Samples whose
    gradient is zero everywhere have no sparsity; they are left out and counted under the name.

    Args:
        gradient_metrics: Per method what :func:`~sg_lightning.objectives.input_gradient_metrics` returns, for the
            same samples.

    Raises:
        ValueError: no method, a missing measure, or not a single finite, non-zero gradient in all methods.
        ImportError: matplotlib is not installed.
    """
    if not gradient_metrics:
        raise ValueError("gradient_metrics is empty: give {method: input_gradient_metrics(forward, x, y)}")
    names = list(gradient_metrics)
    if not any(measured(gradient_metrics[name], "l1").size for name in names):
        raise ValueError("gradient_metrics holds no finite, non-zero gradient: there is nothing to draw")
    figure = style.new_figure(12.2, 0.72 * len(names) + 1.5)
    for i, (key, title, log) in enumerate(PANELS):
        axes = figure.add_subplot(1, len(PANELS), i + 1)
        style.dress(axes, title, grid="x")
        for row, (name, look) in enumerate(style.looks(names).items()):
            values = measured(gradient_metrics[name], key)
            if values.size:
                _distribution(axes, np.log10(values) if log else values, row, look.colour, log=log)
        labels = [_row_label(name, gradient_metrics[name]) if i == 0 else "" for name in names]
        axes.set_yticks(range(len(names)), labels, fontsize=10)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        if log:
            _decades(axes)
    return figure


def _row_label(name: str, metrics: Mapping[str, Tensor]) -> str:
    total = len(metrics["l1"])
    left_out = total - measured(metrics, "l1").size
    return style.plain(name) + (f"\n({left_out} of {total} left out)" if left_out else "")


def _distribution(axes: Axes, values: np.ndarray, row: int, colour: str, *, log: bool) -> None:
    """Draw one row: the shape, the middle half, the median with its number."""
    if np.ptp(values) > 1e-9 * max(1.0, float(np.abs(values).max())):
        places, height = _density(values)
        axes.fill_between(places, row - height, row + height, facecolor=colour, edgecolor=colour, alpha=0.28)
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    axes.plot([low, high], [row, row], color=colour, linewidth=5, solid_capstyle="round")
    axes.plot(middle, row, "o", color="white", markeredgecolor=colour, markeredgewidth=1.6, markersize=7)
    axes.annotate(
        f"{10**middle if log else middle:.3g}", (middle, row), xytext=(0, 10), textcoords="offset points", ha="center",
        fontsize=9, fontweight="bold", color=style.INK,
    )  # fmt: skip


def _density(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Estimate a density over the range of the values (Gaussian kernel, Scott's width), its peak scaled to 0.38."""
    places = np.linspace(values.min(), values.max(), 200)
    width = values.std() * len(values) ** -0.2
    height = np.exp(-0.5 * ((places[:, None] - values[None]) / width) ** 2).sum(1)
    return places, 0.38 * height / height.max()


def _decades(axes: Axes) -> None:
    """Write the ticks of an axis of log10 values as numbers; steps of 1-3-10 where the range is short."""
    low, high = axes.get_xlim()
    ticks = range(math.ceil(low), math.floor(high) + 1)
    places = [float(t) for t in ticks]
    if len(places) < 3:
        places = sorted(v for d in range(math.floor(low), math.ceil(high)) for v in (d, d + math.log10(3)))
        places = [v for v in [*places, math.ceil(high)] if low <= v <= high]
    step = max(1, len(places) // 5)
    axes.set_xticks(places[::step], [f"{10**v:.3g}" for v in places[::step]])


def training_curves(histories: Histories) -> Figure:
    """Draw what was logged per epoch: one panel per quantity, validation solid, training dashed.

    Args:
        histories: Per method, per logged name (``"train/loss"``, ``"val/acc"``), one number per epoch in order; NaN
            where an epoch has none.

    Raises:
        ValueError: no history with a number in it.
        ImportError: matplotlib is not installed.
    """
    quantities: dict[str, list[str]] = {}
    for history in histories.values():
        for logged, values in history.items():
            if any(math.isfinite(v) for v in values):
                names = quantities.setdefault(logged.split("/")[-1], [])
                names += [logged] if logged not in names else []
    if not quantities:
        raise ValueError("histories holds no numbers: give {method: {'train/loss': [0.9, 0.5, ...], ...}}")
    across = min(3, len(quantities))
    down = -(-len(quantities) // across)
    figure = style.new_figure(max(4.4 * across, 6.5), 3.1 * down + 0.5)
    look = style.looks(histories)
    splits: set[bool] = set()
    ticker = require("matplotlib.ticker", "report", "drawing a report")
    for i, (quantity, names) in enumerate(quantities.items()):
        axes = figure.add_subplot(down, across, i + 1)
        style.dress(axes, quantity, "epoch", quantity)
        for method, history in histories.items():
            for logged in names:
                training = logged.startswith("train")
                splits.add(training)
                logs = np.asarray(history.get(logged, ()), dtype=float)
                seen = np.isfinite(logs)
                axes.plot(
                    (np.arange(len(logs)) + 1)[seen], logs[seen], color=look[method].colour,
                    linestyle=(0, (4, 2)) if training else "-", linewidth=1.2 if training else 2,
                    marker=look[method].marker if seen.sum() == 1 else "", label=f"{method} {logged}",
                )  # fmt: skip
        axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=7, integer=True))
    line = require("matplotlib.lines", "report", "drawing a report").Line2D
    handles: list[Any] = [line([], [], color=look[m].colour, linewidth=2, label=style.plain(m)) for m in histories]
    if False in splits:
        handles.append(line([], [], color="#9aa4b0", linestyle="-", linewidth=2, label="validation"))
    if True in splits:
        handles.append(line([], [], color="#9aa4b0", linestyle=(0, (4, 2)), linewidth=1.2, label="training"))
    style.legend(figure, handles)
    return figure
