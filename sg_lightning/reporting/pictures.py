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
_ADDED, _GONE, _MOVED = "#b2182b", "#2166ac", "#762a83"


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

    Of a joint input the modality that changed most is drawn. Every difference of images has a factor of its own, written
    above it, so that small ones can be seen; spikes and events that were added are marked red, those taken away blue,
    and counted. Pixels of event frames that gained some and lost others over time are marked purple.

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
    sample = attacked(shown[0])[1]
    plane = as_plane(sample)
    aspect = 0.8 if sample.dim() == 2 else min(max(plane.shape[0] / plane.shape[1], 0.35), 1.6)
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


def attacked(example: summary.Example) -> tuple[str, Tensor, Tensor]:
    """Return name, clean and adversarial sample of the modality that changed in the largest share of its values."""
    pairs = list(zip(tensors(example.clean), tensors(example.adversarial), strict=True))
    names = list(example.clean) if isinstance(example.clean, dict) else [""]
    shares = [float((clean != adversarial).double().mean()) for clean, adversarial in pairs]
    chosen = shares.index(max(shares))
    return names[chosen], *pairs[chosen]


def is_events(sample: Tensor) -> bool:
    """Tell whether a sample is a raster (T, N) or frames (T, C, H, W) of whole counts."""
    return sample.dim() in (2, 4) and bool((sample == sample.round()).all()) and bool((sample >= 0).all())


def _draw(panels: list[Axes], example: summary.Example, *, headed: bool) -> None:
    name, before, after = attacked(example)
    events = is_events(before) and is_events(after)
    clean, adversarial = as_plane(before), as_plane(after)
    if events:
        moved = (after - before).double()
        note = f"+{moved.clamp_min(0).sum():.0f} −{(-moved).clamp_min(0).sum():.0f}"
        if before.dim() == 2:
            _draw_rasters(panels, clean, adversarial)
        else:
            _draw_frames(panels, clean, adversarial, changes(before, after))
    else:
        note = _draw_planes(panels, clean, adversarial)
    titles = (
        f"{example.label}" + f" ({name})" * bool(name),
        f"{example.label} → {example.predicted}",
        f"{note}, size {example.size:.4g}",
    )
    for axes, head, title in zip(panels, ("clean", "adversarial", "difference"), titles, strict=True):
        axes.set_title(f"{head}\n{title}" if headed else title, fontsize=9, color=style.INK, pad=4)


def changes(before: Tensor, after: Tensor) -> np.ndarray:
    """Mark the pixels of event frames (T, C, H, W) that ever changed: 1 added, 2 taken away, 3 both, else 0; (H, W).

    A sum over time would not show events that only moved in time.
    """
    moved = (after - before).flatten(0, 1)
    marks = (moved > 0).any(0).int() + 2 * (moved < 0).any(0).int()
    return marks.cpu().numpy()


def _draw_frames(panels: list[Axes], clean: np.ndarray, adversarial: np.ndarray, marks: np.ndarray) -> None:
    """Show sums of frames on the scale of the clean one, so that one pixel with many events hides nothing, and marks."""
    scale = _scale(clean, clean)
    for axes, plane in ((panels[0], clean), (panels[1], adversarial)):
        _show(axes, plane, **scale)
    colours = require("matplotlib.colors", "report", "drawing a report")
    kinds = colours.ListedColormap(["#f7f7f7", _ADDED, _GONE, _MOVED])
    _show(panels[2], marks, cmap=kinds, vmin=0, vmax=3)


def _draw_planes(panels: list[Axes], clean: np.ndarray, adversarial: np.ndarray) -> str:
    """Show images side by side; return by how much the difference is amplified."""
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
    return f"×{factor:.2g}"


def _draw_rasters(panels: list[Axes], clean: np.ndarray, adversarial: np.ndarray) -> None:
    """Show rasters (N, T) as densities that read like a spectrogram, and every changed spike as a mark."""
    top = float(max(pooled(clean).max(), pooled(adversarial).max(), 1e-9))
    extent = (-0.5, clean.shape[1] - 0.5, -0.5, clean.shape[0] - 0.5)
    for axes, plane in ((panels[0], clean), (panels[1], adversarial)):
        _show(axes, pooled(plane), cmap="Greys", vmin=0.0, vmax=top, origin="lower", extent=extent)
    _show(panels[2], np.zeros((1, 1)), cmap="Greys", vmin=0.0, vmax=1.0, origin="lower", extent=extent)
    for colour, mask in ((_ADDED, adversarial > clean), (_GONE, adversarial < clean)):
        channel, time = np.nonzero(mask)
        for axes in panels[1:]:
            axes.scatter(
                time, channel, s=min(max(1500 / max(len(time), 1), 0.3), 4.0), c=colour, linewidths=0, zorder=3
            )


def pooled(plane: np.ndarray, most: tuple[int, int] = (70, 100)) -> np.ndarray:
    """Average a raster (N, T) over blocks, so that at most ``most`` rows and columns are left; edges may be smaller."""
    for axis, limit in enumerate(most):
        width = -(-plane.shape[axis] // limit)
        starts = np.arange(0, plane.shape[axis], width)
        sizes = np.diff(np.append(starts, plane.shape[axis]))
        plane = np.add.reduceat(plane, starts, axis=axis) / np.expand_dims(sizes, 1 - axis)
    return plane


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
    return colours.LinearSegmentedColormap.from_list("signed", [_GONE, "#f7f7f7", _ADDED])


def _show(axes: Axes, plane: np.ndarray, **scale: Any) -> None:
    aspect: Literal["equal", "auto"] = "equal" if 0.35 <= plane.shape[0] / plane.shape[1] <= 1.6 else "auto"
    aspect = "auto" if "extent" in scale else aspect
    axes.imshow(np.clip(plane, 0, 1) if plane.ndim == 3 else plane, interpolation="nearest", aspect=aspect, **scale)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#b8c0ca")
