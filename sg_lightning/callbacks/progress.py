"""A bar for the attacks beside the bar of the trainer, whichever it has."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

from sg_lightning.evaluation.progress import Bar, TqdmBar


def bar_beside(trainer: Trainer) -> Bar | None:
    """Return a bar for the attacks of this stage, ``None`` where the trainer shows none (on ranks above 0 too)."""
    own = trainer.progress_bar_callback
    if not isinstance(own, ProgressBar) or not getattr(own, "is_enabled", True) or not trainer.is_global_zero:
        return None
    if isinstance(own, RichProgressBar):
        return _RichBar(own)
    lines = 2 if trainer.state.fn == "fit" else 1  # those of the trainer: training and validation, or one
    return TqdmBar(sys.stdout, position=2 * getattr(own, "process_position", 0) + lines, leave=False)


class _RichBar:
    """One more line of Lightning's rich display, which owns the terminal."""

    def __init__(self, own: RichProgressBar) -> None:
        self._own = own
        self._display: Any = own.progress
        self._task: Any = None
        self._name = ""

    def begin(self, name: str, total: int, done: float) -> None:
        """Show up, with ``done`` of ``total`` samples attacked."""
        self._name = name
        if self._display is not None:
            self._task = self._display.add_task(f"{name:<38}", total=total, completed=done)

    def show(self, attack: str) -> None:
        """Name the attack that runs now."""
        self._update(description=f"{self._name}: {attack:<20}")  # of one width, or all lines would jump

    def advance(self, samples: float) -> None:
        """Count (parts of) samples."""
        self._update(advance=samples)

    def end(self) -> None:
        """Go away. Lightning finds its own lines by their place in the list, so this one is hidden, not removed."""
        self._update(visible=False)

    def _update(self, **change: Any) -> None:
        if self._task is not None:
            self._display.update(self._task, **change)
            self._own.refresh()
