"""Events of an event camera, and the frames that they are counted into."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sg_lightning.datamodules.sparse import SparseSamples
from sg_lightning.domains import Binary, Counts, Domain

Frames = Literal["number", "time"]
Values = Literal["counts", "binary"]
Cells = tuple[NDArray[np.int32], NDArray[np.int16]]
_MOST = np.iinfo(np.int16).max  # events that a cell may count


@dataclass(frozen=True)
class Events:
    """The events of one recording in the order of time.

    Args:
        x: Column of the pixel, (E,), from 0 at the left.
        y: Row of the pixel, (E,), from 0 at the top.
        p: Polarity, (E,), 1 where it became brighter, else 0.
        t: Time in microseconds, (E,), never falling.
    """

    x: NDArray[np.integer]
    y: NDArray[np.integer]
    p: NDArray[np.integer]
    t: NDArray[np.integer]

    def __len__(self) -> int:
        return len(self.t)


@dataclass(frozen=True)
class Slicing:
    """How a recording becomes frames (T, C, H, W).

    Args:
        time_steps: Number of frames T, at least 1.
        frames: ``"number"``: each frame has the same number of events (by one more or less). ``"time"``: each frame
            lasts the same share of the time from the first to the last event.
        values: ``"counts"``: a cell counts its events. ``"binary"``: a cell is 1 if it has any.
        merge_polarity: Count brighter and darker together (C = 1); else channel 0 is darker, 1 is brighter.

    Raises:
        ValueError: on ``time_steps`` below 1, or an unknown ``frames`` or ``values``.
    """

    time_steps: int
    frames: Frames = "number"
    values: Values = "counts"
    merge_polarity: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.time_steps, bool) or not isinstance(self.time_steps, int) or self.time_steps < 1:
            raise ValueError(f"time_steps must be an integer >= 1, got {self.time_steps!r}")
        for name, value, known in (("frames", self.frames, Frames), ("values", self.values, Values)):
            if value not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}")

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return 1 if self.merge_polarity else 2

    @property
    def domain(self) -> Domain:
        """The values that a cell may take."""
        return Binary() if self.values == "binary" else Counts()

    def shape(self, size: int) -> tuple[int, int, int, int]:
        """Return the shape (T, C, size, size) of a sample."""
        return self.time_steps, self.channels, size, size

    def cells(self, events: Events, sensor: tuple[int, int], size: int) -> Cells:
        """Count events into frames of ``size`` x ``size`` cells.

        A pixel (y, x) of the sensor (height, width) falls into cell (y size // height, x size // width), so that a
        smaller grid adds the events of its pixels and counts stay whole numbers.

        Returns:
            Places of the non-empty cells in the flattened sample, ascending, and what they hold.

        Raises:
            ValueError: if a cell gets more than 32,767 events.
        """
        total = self.time_steps * self.channels * size * size
        if len(events) == 0:
            return np.zeros(0, np.int32), np.zeros(0, np.int16)
        if self.frames == "number":
            step = np.arange(len(events)) * self.time_steps // len(events)
        else:
            passed = (events.t - events.t[0]).astype(np.int64)
            step = passed * self.time_steps // (passed[-1] + 1)
        channel = step if self.merge_polarity else step * 2 + events.p
        place = (channel * size + events.y * size // sensor[0]) * size + events.x * size // sensor[1]
        number = np.bincount(place, minlength=total)
        cells = number.nonzero()[0]
        found = number[cells]
        if self.values == "binary":
            found = np.ones_like(found)
        elif found.max() > _MOST:
            raise ValueError(
                f"a cell counts {int(found.max())} events, at most {_MOST} fit: take more time_steps, a larger size, or "
                "values='binary'"
            )
        return cells.astype(np.int32), found.astype(np.int16)

    def samples(self, recordings: Iterable[Cells], labels: Tensor, size: int) -> SparseSamples:
        """Put the cells of all recordings together."""
        cells, counts = zip(*recordings, strict=True)
        offsets = torch.tensor([0, *(len(part) for part in cells)]).cumsum(0)
        values = None if self.values == "binary" else torch.from_numpy(np.concatenate(counts))
        return SparseSamples(torch.from_numpy(np.concatenate(cells)), values, offsets, labels, self.shape(size))
