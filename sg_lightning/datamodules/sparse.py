"""Samples of spikes and events, kept as their non-empty cells and unfolded by the batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sg_lightning.datamodules.base import Batch


class SparseSamples(Dataset[Batch]):
    """Rasters (T, N) or frames (T, C, H, W) as lists of non-empty cells, given as float32 a whole batch at a time.

    A raster of the Spiking Heidelberg Digits has 70,000 cells of which some 7,000 are not empty; a whole batch is
    unfolded in one scatter, so that the data of an epoch fit in memory and loading costs little beside training.

    Args:
        cells: Places of non-empty cells in the flattened sample, one sample after the other, (E,), int32.
        counts: Events of each cell, at least 1, (E,), uint8 or int16; ``None`` where every cell holds one.
        offsets: Where the cells of each sample begin, and the end, ascending, (N + 1,), int64.
        labels: (N,), int64.
        shape: Shape of a sample.
        extra: More about each sample, such as its speaker, by name, each (N,).

    Raises:
        ValueError: if the lengths do not belong together.
    """

    def __init__(
        self,
        cells: Tensor,
        counts: Tensor | None,
        offsets: Tensor,
        labels: Tensor,
        shape: tuple[int, ...],
        extra: Mapping[str, Tensor] | None = None,
    ) -> None:
        if len(offsets) != len(labels) + 1 or int(offsets[-1]) > len(cells) or bool((offsets.diff() < 0).any()):
            raise ValueError(
                f"{len(labels)} labels need {len(labels) + 1} ascending offsets up to {len(cells)} cells, got "
                f"{len(offsets)} up to {int(offsets[-1])}"
            )
        if counts is not None and len(counts) != len(cells):
            raise ValueError(f"{len(cells)} cells need as many counts, got {len(counts)}")
        self.extra = dict(extra or {})
        for name, values in self.extra.items():
            if len(values) != len(labels):
                raise ValueError(f"extra {name!r} has {len(values)} values for {len(labels)} samples")
        self.cells = cells
        self.counts = counts
        self.offsets = offsets
        self.labels = labels
        self.shape = tuple(shape)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        x, y = self.__getitems__([index])
        return x[0], y[0]  # type: ignore[index]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return a batch (B, *shape); the loader asks for it at once."""
        index = torch.as_tensor(indices)
        taken, sizes = self._positions(index)
        volume = math.prod(self.shape)
        batch = torch.zeros(len(index) * volume)
        target = self.cells[taken].long() + torch.arange(len(index)).repeat_interleave(sizes) * volume
        batch[target] = 1.0 if self.counts is None else self.counts[taken].float()
        return batch.view(len(index), *self.shape), self.labels[index]

    def part(self, index: Tensor) -> SparseSamples:
        """Return the samples of ``index``."""
        taken, sizes = self._positions(index)
        offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        counts = None if self.counts is None else self.counts[taken]
        extra = {name: values[index] for name, values in self.extra.items()}
        return SparseSamples(self.cells[taken], counts, offsets, self.labels[index], self.shape, extra)

    def _positions(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the cells of some samples lie, one sample after the other, and how many each has."""
        first, sizes = self.offsets[index], self.offsets[index + 1] - self.offsets[index]
        ends = sizes.cumsum(0)
        total = int(ends[-1]) if len(ends) else 0
        return torch.arange(total) + (first - ends + sizes).repeat_interleave(sizes), sizes
