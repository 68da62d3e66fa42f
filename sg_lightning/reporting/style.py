"""One look for all figures: colours, markers, labels, and how a figure becomes a file.

Figures are plain ``Figure`` objects on an Agg canvas. pyplot and its global state are never touched, so that a report
made in the middle of a training run disturbs nobody's plots.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sg_lightning._optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, GRID, PAPER = "#1c2430", "#5b6675", "#e3e7ec", "#ffffff"
GOOD, BAD = "#0b7a55", "#b3261e"
DPI = 150

# Okabe and Ito's colours for every kind of colour vision, without the yellow that vanishes on white, dark grey first
# for the baseline. Markers repeat the distinction for black-and-white print.
COLOURS = ("#4a5361", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7a4fa3")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
NORM_LABELS = {
    "linf": "L∞", "l2": "L2", "l1": "L1", "l0": "L0", "flips": "flips", "clean": "clean",
    "retime_inf": "retiming B∞", "retime_1": "retiming B1", "retime_0": "retiming B0",
    "relaxed_linf": "L∞, relaxed (infeasible)", "relaxed_l2": "L2, relaxed (infeasible)",
    "relaxed_l1": "L1, relaxed (infeasible)",
}  # fmt: skip


class Look(NamedTuple):
    """How one method is drawn in every figure."""

    colour: str
    marker: str


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """Give every method its colour and marker, by position, the same in all figures."""
    return {
        name: Look(COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)])
        for i, name in enumerate(methods)
    }


def norm_label(norm: str) -> str:
    """Write a norm for people: ``linf`` becomes ``L∞``, ``audio_flips`` ``audio: flips``; unknown names stay."""
    if norm in NORM_LABELS or norm.startswith("joint"):
        return NORM_LABELS.get(norm, norm.replace("_", " "))
    for name in sorted(NORM_LABELS, key=len, reverse=True):  # relaxed_linf before linf
        if norm.endswith(f"_{name}"):
            return f"{norm.removesuffix(f'_{name}')}: {NORM_LABELS[name]}"
    return norm


def percent(share: float, digits: int = 1) -> str:
    """Write a share in [0, 1] as a percentage (with a space that does not break), ``"n/a"`` for NaN."""
    return "n/a" if math.isnan(share) else f"{100 * share:.{digits}f}\u00a0%"


def points(difference: float) -> str:
    """Write a difference of shares in percentage points, with its sign (a true minus)."""
    return f"{100 * difference:+.1f}".replace("-", "−").replace("+0.0", "±0.0").replace("−0.0", "±0.0")


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure of ``width`` x ``height`` inches with an Agg canvas.

    Raises:
        ImportError: matplotlib is not installed; says how to install it.
    """
    figure_module = require("matplotlib.figure", "report", "drawing a report")
    agg = require("matplotlib.backends.backend_agg", "report", "drawing a report")
    engine = require("matplotlib.layout_engine", "report", "drawing a report")
    layout = engine.ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.04)
    figure: Figure = figure_module.Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER, layout=layout)
    agg.FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, title: str = "", x: str = "", y: str = "", grid: str | None = "y") -> None:
    """Give axes the common look: open frame, pale grid, quiet ticks, bold title on the left."""
    axes.set_facecolor(PAPER)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b8c0ca")
    axes.tick_params(colors=SOFT, labelcolor=INK, labelsize=9, length=3)
    if grid:
        axes.grid(visible=True, axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    if title:
        axes.set_title(plain(title), loc="left", fontsize=11, fontweight="bold", color=INK, pad=8)
    axes.set_xlabel(plain(x), fontsize=9.5, color=SOFT)
    axes.set_ylabel(plain(y), fontsize=9.5, color=SOFT)


def plain(text: str) -> str:
    """Keep ``$`` in a name from being read as mathematics."""
    return text.replace("$", r"\$")


def legend(figure: Figure, handles: list[Any], columns: int | None = None) -> None:
    """Put one legend above all panels."""
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=columns or min(len(handles), 6),
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
        handlelength=2.2,
        columnspacing=1.8,
    )


def to_png(figure: Figure) -> bytes:
    """Render a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor=figure.get_facecolor(), metadata={"Software": None})
    return buffer.getvalue()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, never meets half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
