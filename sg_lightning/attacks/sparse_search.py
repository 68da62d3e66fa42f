"""Random search over sparse changes: pixels under L0, single events under event budgets."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sg_lightning.attacks.random_search import SCHEDULE, RandomSearch, draw, whole
from sg_lightning.attacks.search import Samples
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import L0, EventFlips
from sg_lightning.threats.geometry import top_k

_PASSED = (0, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries
_DIVISORS = (1, 2, 4, 5, 6, 8, 10, 12, 15, 20)


@dataclass(frozen=True)
class _SparseSearch(RandomSearch):
    """What the searches over k changes share: how many of them are replaced at a time."""

    alpha: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], got {self.alpha!r}")

    def _share(self, query: int) -> float:
        """Return the share of the changes that this query replaces; at least one is."""
        time = int(query / self.queries * SCHEDULE)
        return self.alpha / _DIVISORS[bisect_left(_PASSED, time)]

    def _changed(self, query: int, changes: int) -> int:
        return max(int(self._share(query) * changes), 1)


@dataclass(frozen=True)
class SparseRS(_SparseSearch):
    """Search eps pixels and their colours at random, under L0.

    A pixel of the threat (all channels of a position, of one step in frames; or a single value) takes the lowest or
    highest value of the domain in each channel. Each query gives some of the changed pixels back and colours as many
    others, fewer and fewer; a single one never takes the colour it has. Where all pixels may change, their colours alone
    are searched. Differs from the official code in that every sample draws its own pixels.

    Args:
        threat: An ``L0`` threat.
        queries: Perturbed points tried per sample, >= 1.
        loss: ``"margin"``, or ``"ce"``.
        alpha: Share of the pixels that is replaced at first, 0 < alpha <= 1; a schedule, stretched to the number of
            queries, divides it by up to 20.

    Raises:
        TypeError: under other threats.
        ValueError: on settings out of range.

    Source:
        Croce et al., "Sparse-RS", arXiv 2006.12834; alpha 0.3 as its authors advise for untargeted attacks.
    """

    threat: L0
    kind: ClassVar[str] = "sparse_rs"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.threat, L0):
            raise TypeError(f"SparseRS is defined for L0, got {self.threat!r}; use Square or FlipSearch")

    def _start(self, at: Samples, noise: SampleGenerator) -> dict[str, Tensor]:
        at.clean = self.threat.pixels(at.x)
        order = draw(noise, at.x, at.clean.shape[1]).argsort(dim=1)
        inside, outside = order[:, : self.threat.count], order[:, self.threat.count :]
        point = _put(at.clean, inside, self._colours(_take(at.clean, inside), noise.fork("colour"), free=True))
        return {"point": self.threat.from_pixels(point, at.x), "inside": inside, "outside": outside}

    def _propose(self, at: Samples, query: int, noise: SampleGenerator) -> dict[str, Tensor]:
        free = at.outside.shape[1]
        changed = min(self._changed(query, self.threat.count), free or self.threat.count)
        leave = draw(noise.fork("leave"), at.x, self.threat.count).topk(changed).indices
        old, point = at.inside.gather(1, leave), self.threat.pixels(at.point)
        found = {}
        if free:
            enter = draw(noise.fork("enter"), at.x, free).topk(changed).indices
            new = at.outside.gather(1, enter)
            found = {"inside": at.inside.scatter(1, leave, new), "outside": at.outside.scatter(1, enter, old)}
            point = _put(point, old, _take(at.clean, old))
        else:
            new = old
        point = _put(point, new, self._colours(_take(point, new), noise.fork("colour"), free=changed > 1))
        return {"point": self.threat.from_pixels(point, at.x), **found}

    def _colours(self, now: Tensor, noise: SampleGenerator, *, free: bool) -> Tensor:
        """Draw colours (B, m, c) at the corners of the domain; unless ``free``, others than ``now``."""
        low, high = self.threat.domain.low, self.threat.domain.high
        channels = now.shape[2]
        bright = draw(noise, now, *now.shape[1:]) < 0.5
        if not free and channels <= 52:  # beyond, chance does not meet the same corner
            corner = ((now == low) | (now == high)).all(2, keepdim=True)
            code = whole(draw(noise.fork("other"), now, now.shape[1], 1), 2**channels - 1) + 1
            flips = (code >> torch.arange(channels, device=now.device)) % 2 == 1
            bright = torch.where(corner, (now == high) ^ flips, bright)
        return torch.where(bright, high, low).to(now.dtype)


@dataclass(frozen=True)
class FlipSearch(_SparseSearch):
    """Search eps single events to add or delete at random: Sparse-RS carried over to events.

    A change adds an event to a cell drawn evenly from those with room, or deletes an event drawn evenly from those
    there are; where the threat allows both, with equal chance, so that the few events of a sparse raster are tried as
    often as its many empty cells. Each query draws some changes anew, fewer and fewer by the schedule of Sparse-RS.
    On counts several changes may meet in a cell and each counts; nothing is clamped but to the domain. A change that
    leaves the loss as it is is kept: spikes answer in steps, and two changes of one bit are worth as much as one.

    Args:
        threat: An ``EventFlips`` threat.
        queries: Perturbed points tried per sample, >= 1.
        loss: ``"margin"``, or ``"ce"``.
        alpha: Share of the changes that is drawn anew at first, 0 < alpha <= 1.

    Raises:
        TypeError: under other threats.
        ValueError: on settings out of range.

    Source:
        The schedule and the principle: Croce et al., "Sparse-RS", arXiv 2006.12834.
    """

    threat: EventFlips
    kind: ClassVar[str] = "flip_search"
    sideways: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.threat, EventFlips):
            raise TypeError(f"FlipSearch is defined for EventFlips, got {self.threat!r}; use SparseRS under L0")

    def _start(self, at: Samples, noise: SampleGenerator) -> dict[str, Tensor]:
        flat = at.x.flatten(1).double()
        at.addable = (self.threat.allowed(torch.ones_like(flat), at.x) >= 1).double().cumsum(1)
        at.deletable = self.threat.allowed(-torch.ones_like(flat), at.x).floor().cumsum(1)
        at.limit = self.threat.limits(at.x).unsqueeze(1)
        return self._with(at, *self._moves(at, noise, int(at.limit.max())))

    def _propose(self, at: Samples, query: int, noise: SampleGenerator) -> dict[str, Tensor]:
        changed = (self._share(query) * at.limit).floor().clamp_min(1)
        lottery = (draw(noise.fork("replaced"), at.x, at.cells.shape[1]) + 1.0) * self._own(at, at.cells)
        replaced = top_k(lottery, changed).bool()
        cells, steps = self._moves(at, noise, at.cells.shape[1])
        return self._with(at, torch.where(replaced, cells, at.cells), torch.where(replaced, steps, at.steps))

    def _own(self, at: Samples, slots: Tensor) -> Tensor:
        """Tell which of the changes (B, count) are within the budget of their sample, which may be a share."""
        return torch.arange(slots.shape[1], device=slots.device) < at.limit

    def _moves(self, at: Samples, noise: SampleGenerator, count: int) -> tuple[Tensor, Tensor]:
        """Draw changes (B, count): the cell of each, and +1 or -1 (0 where nothing may change or the budget ends)."""
        adds, deletes = at.addable[:, -1:], at.deletable[:, -1:]
        coin = draw(noise.fork("coin"), at.x, count) < 0.5
        adding = (coin & (adds > 0)) | (deletes == 0)
        which = draw(noise.fork("cell"), at.x, count)
        added = torch.searchsorted(at.addable, which * adds, right=True)
        deleted = torch.searchsorted(at.deletable, which * deletes, right=True)
        cells = torch.where(adding, added, deleted).clamp_max(at.addable.shape[1] - 1)
        able = ((adds > 0) | (deletes > 0)) & self._own(at, cells)
        return cells, torch.where(adding, 1.0, -1.0).to(at.x.dtype) * able

    def _with(self, at: Samples, cells: Tensor, steps: Tensor) -> dict[str, Tensor]:
        moved = at.x.flatten(1).scatter_add(1, cells, steps).view(at.x.shape)
        return {"point": self.threat.domain.clip(moved), "cells": cells, "steps": steps}


def _take(pixels: Tensor, index: Tensor) -> Tensor:
    """Take the pixels ``index`` (B, m) of (B, P, c)."""
    return pixels.gather(1, index.unsqueeze(2).expand(-1, -1, pixels.shape[2]))


def _put(pixels: Tensor, index: Tensor, colours: Tensor) -> Tensor:
    """Give the pixels ``index`` (B, m) of (B, P, c) their colours (B, m, c)."""
    return pixels.scatter(1, index.unsqueeze(2).expand_as(colours), colours)
