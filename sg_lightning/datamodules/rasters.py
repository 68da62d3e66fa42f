"""What data modules of audio spikes share: times and channels of spikes become rasters in time bins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from sg_lightning.datamodules.base import SampleData
from sg_lightning.datamodules.sparse import SparseSamples
from sg_lightning.domains import Binary, Counts, Domain
from sg_lightning.inputs import Input
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import Budget, Budgets

Values = Literal["binary", "counts"]
Train = tuple[NDArray[Any], NDArray[Any]]  # times in seconds and channels of one sample

# Shares, because utterances differ several times in their spikes. No attack on these sets has been published to choose by.
AUDIO_BUDGETS: Budgets = {
    "flips": Budget(
        ("0.5%", "1%", "2%", "5%"),
        "1%",
        "One spike in a hundred appears or vanishes.",
    ),
    "retime_inf": Budget((1, 2, 3), 1, "The least there is: every spike may move by one time bin."),
    "retime_0": Budget(
        ("0.5%", "1%", "2%", "5%"),
        "2%",
        "Two spikes in a hundred move in time, none changes its channel; a move is two flips.",
    ),
}


class RasterData(SampleData):
    """Base of the data modules of spike trains of channels; a subclass reads the files.

    Args:
        batch_size: Samples per batch, at least 1.
        time_steps: Number of time bins T.
        duration: Seconds that the bins share. Later spikes are left out.
        group: Neighbouring channels that become one; it must divide the number of channels.
        values: Whether a cell says that there was a spike, ``"binary"``, or how many, ``"counts"``.
        num_workers: Loader processes; 0 is usually fastest.
        val_fraction: Share of the training samples that validates, above 0 and below 1.
        seed: Seed of the validation split and of the training order.
        augment: Shift each training raster at random by up to 8 % of its bins and 3 % of its channels; what leaves is lost.

    Attributes:
        num_classes: Number of classes.
        channels: Channels of the files, before grouping.
        input_shape: T and the number of channels N after grouping.
        domain: ``Binary()`` or ``Counts()``.
        budgets: The budgets of each norm that attacks use by default.

    Shape:
        Batches of rasters (B, T, N), float32 whole numbers, and labels (B,), int64.

    Raises:
        ValueError: on an argument out of its range.
    """

    num_classes: ClassVar[int]
    channels: ClassVar[int] = 700
    budgets: ClassVar[Budgets] = AUDIO_BUDGETS
    noun: ClassVar[str] = "utterances"

    def __init__(
        self,
        batch_size: int,
        *,
        time_steps: int,
        duration: float,
        group: int,
        values: Values,
        num_workers: int,
        val_fraction: float,
        seed: int,
        augment: bool,
    ) -> None:
        super().__init__(batch_size, num_workers=num_workers, val_fraction=val_fraction, seed=seed)
        for name, value in (("time_steps", time_steps), ("group", group)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if self.channels % group:
            fits = ", ".join(str(n) for n in range(1, self.channels + 1) if self.channels % n == 0)
            raise ValueError(f"group must divide the {self.channels} channels, got {group}; choose one of {fits}")
        if not 0 < duration < math.inf:
            raise ValueError(f"duration must be a number of seconds above 0, got {duration!r}")
        if values not in get_args(Values):
            raise ValueError(f"values must be 'binary' or 'counts', got {values!r}")
        self.time_steps = time_steps
        self.duration = float(duration)
        self.group = group
        self.values = values
        self.augment = augment
        self.domain: Domain = Binary() if values == "binary" else Counts()

    @property
    def in_features(self) -> int:
        """Channels of a raster, for the network."""
        return self.channels // self.group

    @property
    def input_shape(self) -> tuple[int, int]:
        """Time bins and channels of a raster."""
        return self.time_steps, self.in_features

    def augmented(self, x: Input, noise: SampleGenerator) -> Input:
        """Shift training rasters, if so wanted."""
        if not self.augment:
            return x
        assert isinstance(x, Tensor)
        return shifted(x, round(0.08 * self.time_steps), round(0.03 * self.in_features), noise)

    def rasters(self, trains: Iterable[Train], labels: NDArray[Any], extra: Mapping[str, Tensor]) -> SparseSamples:
        """Bin spike trains that have been checked.

        Args:
            trains: Times and channels of each sample.
            labels: (N,).
            extra: More about each sample, (N,) each.
        """
        cells, counts, sizes = [], [], [0]
        for times, units in trains:
            # In float64: a float16 of 1.3999 s times 100 bins is rounded up to the end.
            bins = (times.astype(np.float64) * (self.time_steps / self.duration)).astype(np.int64)
            inside = bins < self.time_steps
            place = bins[inside] * self.in_features + units[inside].astype(np.int64) // self.group
            found, count = np.unique(place, return_counts=True)
            cells.append(found.astype(np.int32))
            counts.append(np.minimum(count, np.iinfo(np.int16).max).astype(np.int16))
            sizes.append(len(found))
        return SparseSamples(
            torch.from_numpy(np.concatenate(cells)),
            None if self.values == "binary" else torch.from_numpy(np.concatenate(counts)),
            torch.from_numpy(np.cumsum(sizes, dtype=np.int64)),
            torch.from_numpy(labels.astype(np.int64)),
            self.input_shape,
            extra,
        )

    def whole_speakers(self, samples: SparseSamples, chosen: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Return the indices of the samples that train and that validate, where all of some speakers validate."""
        speakers, chosen = samples.extra["speaker"].long(), sorted(set(chosen))
        known = speakers.unique().tolist()
        if not chosen or not set(chosen) < set(known):
            raise ValueError(
                f"val_speakers must be some of the speakers of the training samples, {known}, not all, got {chosen}"
            )
        validates = torch.isin(speakers, torch.tensor(chosen))
        return (~validates).nonzero().flatten(), validates.nonzero().flatten()


def shifted(x: Tensor, bins: int, channels: int, noise: SampleGenerator) -> Tensor:
    """Shift each raster of a batch (B, T, N) by its own offsets of up to so many bins and channels, filling with zeros."""
    size, steps, width = x.shape
    far = torch.tensor([2 * bins + 1, 2 * channels + 1], device=x.device)
    moved = (noise.fork("shift").uniform(x.new_empty(size, 2)) * far).long()
    rows = moved[:, :1] + torch.arange(steps, device=x.device)
    columns = moved[:, 1:] + torch.arange(width, device=x.device)
    batch = torch.arange(size, device=x.device).view(-1, 1, 1)
    return pad(x, [channels, channels, bins, bins])[batch, rows.unsqueeze(2), columns.unsqueeze(1)]
