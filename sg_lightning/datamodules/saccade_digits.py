"""Scikit-learn's handwritten digits before a simulated event camera that moves in three saccades."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from sg_lightning.datamodules.digits import embedded_digits
from sg_lightning.datamodules.event_camera import EventCamera
from sg_lightning.datamodules.events import EventData
from sg_lightning.datamodules.slicing import Events, Frames, Values
from sg_lightning.datamodules.sparse import SparseSamples
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import Budget, Budgets

_SIZE = 16  # pixels of the sensor on a side
_ZOOM = 1.5  # pixels per pixel of a digit
_CORNERS = ((0.0, 0.0), (3.0, 1.5), (0.0, 3.0), (0.0, 0.0))  # of the path, rows and columns in pixels, as N-MNIST's
_STEPS = 25  # images of a saccade; a pixel's logarithm changes by less than a threshold between two
_STEP_US = 4000.0
_DARKEST = 0.1  # brightness of the background where a stroke has 1
_SEED = 0  # of the noise: the data are the same in every run


class SaccadeDigits(EventData):
    """Load scikit-learn's digits as a simulated event camera sees them; no download, no network.

    **A stand-in** for N-MNIST, made on the fly in a few seconds: the 1,797 real images of 8 x 8 pixels, enlarged smoothly
    and moved along a triangle before a camera of 16 x 16 pixels for 300 ms. The same images train and test as in
    :class:`~sg_lightning.datamodules.Digits`, in the same order, and the events of an image are the same in every run.

    Args:
        batch_size: Samples per batch, at least 1.
        time_steps: Number of frames T, at least 1.
        frames: ``"number"``: frames of equal number of events; ``"time"``: frames of equal duration.
        values: ``"counts"``: a cell counts its events, without a ceiling; ``"binary"``: it is 1 if it has any.
        merge_polarity: Count brighter and darker together (C = 1); else channel 0 is darker, 1 is brighter.
        num_workers: Loader processes; 0 is fastest for data this small.
        val_fraction: Share of the 1,300 training images that validates, above 0 and below 1.
        seed: Seed of the validation split and of the training order.

    Shape:
        Batches of frames (B, T, C, 16, 16), float32 whole numbers, and labels (B,), int64 in 0..9.

    Raises:
        ValueError: on an argument outside its range.

    Source:
        Images: see :class:`~sg_lightning.datamodules.Digits`. Motion: the three saccades of N-MNIST (Orchard et al., 2015),
        100 ms each, at constant speed. Camera: :class:`~sg_lightning.datamodules.event_camera.EventCamera`.
    """

    stand_in = "a simulated event camera"
    usual_budgets: ClassVar[Budgets] = {
        "flips": Budget(
            eps=("1%", "2%", "5%"),
            headline="5%",
            reason="As many events as the camera adds by itself as noise: 77 of the 1,560 of a recording. About 40 % of the "
            "validation digits survive in a vanilla ConvNet, all but a few the same number of random changes.",
        ),
        "retime_inf": Budget(
            eps=(1, 2),
            headline=1,
            reason="Every event may come one frame of 50 ms earlier or later, the least that can be changed. About 8 % of "
            "the validation digits survive in a vanilla ConvNet.",
        ),
        "retime_0": Budget(
            eps=("1%", "2%", "4%"),
            headline="4%",
            reason="One non-empty cell in 25 may move to another frame of its pixel. About 18 % of the validation digits "
            "survive in a vanilla ConvNet, about 70 % at 2 %.",
        ),
        "retime_1": Budget(
            eps=("5%", "10%", "20%"),
            headline="10%",
            reason="As many frames of shift in all as one non-empty cell in ten makes. About 50 % of the validation digits "
            "survive in a vanilla ConvNet.",
        ),
    }

    def __init__(
        self,
        batch_size: int = 64,
        *,
        time_steps: int = 6,
        frames: Frames = "time",
        values: Values = "counts",
        merge_polarity: bool = False,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size,
            time_steps=time_steps,
            frames=frames,
            values=values,
            merge_polarity=merge_polarity,
            size=_SIZE,
            num_workers=num_workers,
            val_fraction=val_fraction,
            seed=seed,
        )
        self.setup("fit")  # nothing to download, so mistakes show now

    def read(self) -> tuple[SparseSamples, SparseSamples]:
        """Record all digits, and count their events into frames."""
        _, labels, rest, test = embedded_digits()
        cells = (self.slicing.cells(events, (_SIZE, _SIZE), _SIZE) for events in _all_digits())
        samples = self.slicing.samples(cells, labels, _SIZE)
        return samples.part(rest), samples.part(test)


@cache
def _all_digits() -> list[Events]:
    """Record the digits of the package, once in a process."""
    return recorded(embedded_digits()[0], EventCamera())


def recorded(images: Tensor, camera: EventCamera, first: int = 0) -> list[Events]:
    """Move digits before a camera.

    Args:
        images: (N, 8, 8), uint8 in 0..16.
        camera: The camera.
        first: Number of the first image, which keys its noise.
    """
    noise = SampleGenerator.from_ids(_SEED, torch.arange(first, first + len(images)))
    # In double precision, so that no machine's rounding makes or moves an event.
    return camera.record(_scenes(images.double() / 16), _STEP_US, noise)


def _scenes(images: Tensor) -> Iterator[Tensor]:
    """Yield the logarithm of brightness (N, 16, 16) of the images in [0, 1] along the path."""
    corners = torch.tensor(_CORNERS)
    for number in range(_STEPS * (len(_CORNERS) - 1) + 1):
        leg = min(number // _STEPS, len(_CORNERS) - 2)
        row, column = torch.lerp(corners[leg], corners[leg + 1], number / _STEPS - leg).tolist()
        enlarging = torch.kron(_enlarging(images.shape[1], row), _enlarging(images.shape[2], column))
        brightness = _DARKEST + (1 - _DARKEST) * (images.flatten(1) @ enlarging.T)
        yield brightness.log_().view(-1, _SIZE, _SIZE)


def _enlarging(pixels: int, shift: float) -> Tensor:
    """Return the matrix (16, pixels) that enlarges a row by cubic B-splines: smooth, never negative, at most 1."""
    place = (torch.arange(_SIZE, dtype=torch.float64) + 0.5 - shift - 0.25) / _ZOOM - 0.5
    distance = (place.unsqueeze(1) - torch.arange(pixels)).abs()
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = (2 - distance).clamp_min(0) ** 3 / 6
    return torch.where(distance < 1, near, far)
