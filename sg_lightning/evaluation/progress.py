"""What a user sees while samples are attacked: which attack, how many samples, how long it will still take."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from tqdm.auto import tqdm

from sg_lightning.attacks import Attack, Suite


class Bar(Protocol):
    """Where progress is shown."""

    def begin(self, name: str, total: int, done: float) -> None:
        """Show up, with ``done`` of ``total`` samples attacked."""

    def show(self, attack: str) -> None:
        """Name the attack that runs now."""

    def advance(self, samples: float) -> None:
        """Count (parts of) samples."""

    def end(self) -> None:
        """Go away."""


class TqdmBar:
    """A bar of tqdm.

    Args:
        file: Stream; ``None``: stderr.
        position: Line below the cursor, ``None``: the first free one.
        leave: Whether the finished bar stays.
    """

    def __init__(self, file: TextIO | None = None, *, position: int | None = None, leave: bool = True) -> None:
        self._options: dict[str, Any] = {"file": file, "position": position, "leave": leave}
        self._bar: Any = None

    def begin(self, name: str, total: int, done: float) -> None:
        """Show up, with ``done`` of ``total`` samples attacked."""
        self._bar = tqdm(
            total=total, initial=done, desc=name, smoothing=0, dynamic_ncols=True, **self._options,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total} samples [{elapsed}<{remaining}{postfix}]",
        )  # fmt: skip

    def show(self, attack: str) -> None:
        """Name the attack that runs now."""
        # At once where somebody looks; in a log file with the next change of the number.
        self._bar.set_postfix_str(attack, refresh=(self._options["file"] or sys.stderr).isatty())

    def advance(self, samples: float) -> None:
        """Count (parts of) samples."""
        self._bar.update(min(samples, self._bar.total - self._bar.n))

    def end(self) -> None:
        """Go away."""
        if self._bar is not None:
            self._bar.set_postfix_str("", refresh=False)
            self._bar.close()
            self._bar = None


class Watch:
    """Tells a bar about the attacks on batches, each weighted by the gradients it may take.

    Args:
        bar: Where to show it, or ``None``.
        suite: What runs on every sample.
        samples: Samples of this process.
        checks: How many of them undergo every attack once more.
    """

    def __init__(self, bar: Bar | None, suite: Suite, samples: int, checks: int) -> None:
        self.bar = bar
        main = sum(_cost(attack) for entry in suite.entries for attack in entry.attacks)
        main += suite.control * len(suite.entries)
        last = sum(_cost(e.attacks[-1]) + sum(map(_cost, e.attacks)) + 1 for e in suite.entries if e.headline)
        self._per_sample = main + last * checks / max(samples, 1)

    @contextmanager
    def attack(self, attack: Attack, samples: int) -> Iterator[None]:
        """Show an attack on a batch while it runs."""
        if self.bar is None:
            yield
            return
        self.bar.show(f"{attack.threat.norm} {attack.threat.eps} {attack.name}")
        yield
        self.bar.advance(samples * _cost(attack) / self._per_sample)


def _cost(attack: Attack) -> int:
    return int(getattr(attack, "steps", 1)) * int(getattr(attack, "restarts", 1))
