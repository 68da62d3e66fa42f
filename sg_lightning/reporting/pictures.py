"""Figures of inputs: clean, adversarial and the difference, for images, event frames and spike rasters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sg_lightning._optional import require
from sg_lightning.evaluation import RobustnessResult
from sg_lightning.inputs import tensors
from sg_lightning.reporting import style, summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

PER_NORM = 2  # examples of each norm, side by side


def as_plane(x: Tensor) -> np.ndarray:
    """Turn one sample into an array (H, W) or (H, W, 3) to look at, in input units.

    Images (1 or 3, H, W) stay; event frames (T, C, H, W) are summed over time; of two polarities (2, H, W) the
    difference on minus off is shown, of any other number of channels the mean; rasters (T, N) are turned so that time
    runs to the right; vectors (N,) become one row.

    Raises:
        ValueError: the sample has no axis or more than four.
    """
    a: np.ndarray = x.detach().cpu().double().numpy()
    if not 1 <= a.ndim <= 4:
        raise ValueError(f"cannot draw a sample of shape {tuple(x.shape)}: expected one to four axes")
    if a.ndim == 4:
        a = a.sum(0)
    if a.ndim == 3:
        channels = a.shape[0]
        return a.transpose(1, 2, 0) if channels == 3 else a[0] - a[1] if channels == 2 else a.mean(0)
    return a.T if a.ndim == 2 else a[None]


def examples_figure(result: RobustnessResult, name: str = "") -> Figure:
    """Draw clean input, adversarial input and amplified difference for some samples of each norm.

    Of a joint input the first modality is drawn. Every difference has a factor of its own, written above it, so that
    small ones can be seen.

    Args:
        result: An evaluation that kept examples.
        name: The method, for the heading.

    Raises:
        ValueError: the result holds no examples.
        ImportError: matplotlib is not installed.
    """
    shown = summary.examples(result)
    by_norm = {norm: [e for e in shown if e.norm == norm][:PER_NORM] for norm in dict.fromkeys(e.norm for e in shown)}
    if not by_norm:
        raise ValueError("the result holds no examples: no attack succeeded, or the evaluation kept none")
    groups = max(len(found) for found in by_norm.values())
    plane = as_plane(tensors(shown[0].clean)[0])
    aspect = min(max(plane.shape[0] / plane.shape[1], 0.35), 1.6)
    figure = style.new_figure(1.35 * 3 * groups + 1.4, (1.35 * aspect + 0.32) * len(by_norm) + 0.75)
    # A narrow empty column sets the groups of three apart.
    widths = ([1, 1, 1, 0.18] * groups)[:-1]
    grid = figure.add_gridspec(len(by_norm), len(widths), width_ratios=widths)
    for row, (norm, found) in enumerate(by_norm.items()):
        for group, example in enumerate(found):
            panels = [figure.add_subplot(grid[row, 4 * group + i]) for i in range(3)]
            _draw(panels, example, headed=row == 0)
            if group == 0:
                label = f"{style.norm_label(norm)}\nε = {example.eps}"
                panels[0].set_ylabel(
                    style.plain(label), rotation=0, ha="right", va="center", fontsize=10.5, fontweight="bold",
                    color=style.INK, labelpad=10,
                )  # fmt: skip
    if name:
        figure.suptitle(style.plain(name), x=0.01, ha="left", fontsize=12, fontweight="bold", color=style.INK)
    return figure


def _draw(panels: list[Axes], example: summary.Example, *, headed: bool) -> None:
    clean, adversarial = (as_plane(tensors(x)[0]) for x in (example.clean, example.adversarial))
    difference = adversarial - clean
    largest = float(np.abs(difference).max())
    scale = _scale(clean, adversarial)
    for axes, plane in ((panels[0], clean), (panels[1], adversarial)):
        _show(axes, plane, **scale)
    span = 0.5 if clean.ndim == 3 else float(scale["vmax"])  # colours are drawn around mid-grey
    factor = span / largest if largest > 0 else 1.0
    if difference.ndim == 3:
        _show(panels[2], 0.5 + factor * difference)
    else:
        _show(panels[2], factor * difference, cmap=_diverging(), vmin=-span, vmax=span)
    titles = (
        f"{example.label}",
        f"{example.label} → {example.predicted}",
        f"×{factor:.2g}, size {example.size:.3g}",
    )
    for axes, head, title in zip(panels, ("clean", "adversarial", "difference"), titles, strict=True):
        axes.set_title(f"{head}\n{title}" if headed else title, fontsize=9, color=style.INK, pad=4)


def _scale(clean: np.ndarray, adversarial: np.ndarray) -> dict[str, Any]:
    """Choose one scale for a pair: colours for signed planes (on minus off), ink on paper for the others."""
    if clean.ndim == 3:
        return {"vmin": 0.0, "vmax": 1.0}
    low = float(min(clean.min(), adversarial.min()))
    high = float(max(clean.max(), adversarial.max(), 1.0 if low >= 0 else -low))
    if low >= 0:
        return {"cmap": "Greys", "vmin": 0.0, "vmax": high}
    return {"cmap": _diverging(), "vmin": -high, "vmax": high}


def _diverging() -> Any:
    colours = require("matplotlib.colors", "report", "drawing a report")
    return colours.LinearSegmentedColormap.from_list("signed", ["#2166ac", "#f7f7f7", "#b2182b"])


def _show(axes: Axes, plane: np.ndarray, **scale: Any) -> None:
    aspect: Literal["equal", "auto"] = "equal" if 0.35 <= plane.shape[0] / plane.shape[1] <= 1.6 else "auto"
    axes.imshow(np.clip(plane, 0, 1) if plane.ndim == 3 else plane, interpolation="nearest", aspect=aspect, **scale)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#b8c0ca")
