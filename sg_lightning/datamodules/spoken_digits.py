"""Spoken digits of a speech synthesiser as cochlea spikes, shipped with the package."""

from __future__ import annotations

from importlib.resources import files
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sg_lightning.datamodules.base import Samples
from sg_lightning.datamodules.rasters import RasterData, Values
from sg_lightning.datamodules.sparse import SparseSamples
from sg_lightning.threats import Budget, Budgets


class SpokenDigits(RasterData):
    """Load spoken digits as spikes of 140 channels; a stand-in made of synthetic speech, no download, no network.

    The digits 0 to 9 in English and German, spoken by voices of the synthesiser espeak-ng at various rates and pitches and
    turned into spikes by :class:`~sg_lightning.cochlea.Cochlea`. The label is the digit, whatever the language. The test
    voices are never heard in training, and whole voices validate. Twelve voices that networks trained on the others could
    not follow were left out of training and test alike, so the test voices are easier than voices drawn at random.
    Synthetic voices differ less than people do: figures say nothing about recordings of speech, for which there is
    :class:`SHD`.

    Args:
        batch_size: Utterances per batch, at least 1.
        time_steps: Number of time bins T.
        duration: Seconds that the bins share. Later spikes are left out.
        group: Neighbouring channels that become one; it must divide 140.
        values: Whether a cell says that there was a spike, ``"binary"``, or how many, ``"counts"``.
        num_workers: Loader processes; 0 is fastest for data this small.
        val_fraction: Share of the training voices that validates, above 0 and below 1; drawn with ``seed``.
        seed: Seed of the validation split and of the training order.
        augment: Shift training rasters at random by up to 8 % of their bins and 3 % of their channels.

    Attributes:
        languages: Names of the languages, by their number in ``extra["language"]`` of a set of samples.
        voices: Names of the voices, by their number in ``extra["speaker"]``.

    Shape:
        Batches of rasters (B, T, 140 / group), float32 whole numbers, and labels (B,), int64 in 0..9.

    Raises:
        ValueError: on an argument out of its range, or a ``val_fraction`` that leaves no voice on one side.
    """

    num_classes: ClassVar[int] = 10
    channels: ClassVar[int] = 140
    stand_in = "synthetic speech"
    # Chosen on the validation voices (100 utterances, vanilla SpikingMLP of configs/experiments, suite `basic`).
    budgets: ClassVar[Budgets] = {
        "flips": Budget(
            eps=("0.5%", "1%", "2%", "5%"),
            headline="5%",
            reason="Fifteen of the 300 spikes of an utterance appear or vanish: 30 % survive in a vanilla SpikingMLP under the "
            "suite `basic`, 73 % at 2 %. As many random ones cost one point.",
        ),
        "retime_inf": Budget(
            eps=(1, 2, 3),
            headline=1,
            reason="Every spike may move by one time bin of 16 ms, the least there is: 43 % survive in a vanilla SpikingMLP under "
            "the suite `basic`. Random moves cost nothing.",
        ),
        "retime_0": Budget(
            eps=("0.5%", "1%", "2%", "5%"),
            headline="5%",
            reason="Fifteen of 300 spikes move in time, as far as they like, in their channel: 39 % survive in a vanilla "
            "SpikingMLP under the suite `basic`, 80 % at 2 %. As many random moves cost nothing.",
        ),
    }
    languages: tuple[str, ...]
    voices: tuple[str, ...]

    def __init__(
        self,
        batch_size: int = 64,
        *,
        time_steps: int = 50,
        duration: float = 0.8,
        group: int = 2,
        values: Values = "binary",
        num_workers: int = 0,
        val_fraction: float = 0.1,
        seed: int = 0,
        augment: bool = True,
    ) -> None:
        super().__init__(
            batch_size, time_steps=time_steps, duration=duration, group=group, values=values, num_workers=num_workers,
            val_fraction=val_fraction, seed=seed, augment=augment,
        )  # fmt: skip
        self.setup("fit")  # nothing to download, so mistakes show now

    def read(self) -> tuple[Samples, Samples]:
        """Read both parts from the package."""
        with files("sg_lightning.datamodules").joinpath("data/spoken_digits.npz").open("rb") as file:
            data = dict(np.load(file))
        self.languages, self.voices = (tuple(map(str, data[key])) for key in ("languages", "voices"))
        counts = data["counts"].astype(np.int64)  # spikes of each channel of each sample
        gaps = data["gaps"].astype(np.int64)  # from spike to spike of one channel, at first from the start
        total = gaps.cumsum()
        lengths = counts.ravel()
        before = np.concatenate([[0], total])[lengths.cumsum() - lengths]
        times = (total - before.repeat(lengths) + 0.5) * data["step"]
        units = np.tile(np.arange(self.channels), len(counts)).repeat(lengths)
        ends = counts.sum(1).cumsum()[:-1]
        trains = zip(np.split(times, ends), np.split(units, ends), strict=True)
        extra = {key: torch.from_numpy(data[key].astype(np.int64)) for key in ("language", "speaker", "rate", "pitch")}
        samples = self.rasters(trains, data["labels"], extra)
        test = torch.from_numpy(data["test"])
        return samples.part((~test).nonzero().flatten()), samples.part(test.nonzero().flatten())

    def split(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return the indices that train and that validate; whole voices, drawn with ``seed``."""
        assert isinstance(samples, SparseSamples)
        voices = samples.extra["speaker"].unique()
        held_out = round(self.val_fraction * len(voices))
        if not 0 < held_out < len(voices):
            raise ValueError(
                f"val_fraction must leave voices on both sides of {len(voices)}, got {self.val_fraction!r}"
            )
        order = torch.randperm(len(voices), generator=torch.Generator().manual_seed(self.seed))
        return self.whole_speakers(samples, voices[order[:held_out]].tolist())
