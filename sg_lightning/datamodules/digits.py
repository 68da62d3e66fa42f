"""Scikit-learn's handwritten digits, shipped with the package."""

from __future__ import annotations

from importlib.resources import files
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sg_lightning.datamodules.pixels import ByteImages, ImageData
from sg_lightning.threats import Budget


class Digits(ImageData):
    """Load 1,797 real handwritten digits of 8 x 8 pixels; no download, no network.

    The 497 test images are fixed (drawn once, balanced over the classes) and shipped with the data. Of the other 1,300
    a share drawn with ``seed`` validates and the rest trains. Split by image, not by writer.

    Args:
        batch_size: Images per batch, at least 1.
        num_workers: Loader processes; 0 is fastest for data this small.
        val_fraction: Share of the 1,300 images that validates, above 0 and below 1.
        seed: Seed of the validation split and of the training order.

    Shape:
        Batches of images (B, 1, 8, 8), float32 in [0, 1], and labels (B,), int64 in 0..9.

    Raises:
        ValueError: on ``batch_size`` below 1, ``num_workers`` below 0, or a ``val_fraction`` that leaves no image for
            training or for validation.

    Source:
        The test part of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, UCI, 1998, CC BY 4.0), by way
        of ``sklearn.datasets.load_digits``. The writers of training and test images overlap, as always with this set.
    """

    input_shape: ClassVar[tuple[int, ...]] = (1, 8, 8)
    budgets: ClassVar[dict[str, Budget]] = {
        "linf": Budget(
            eps=("1/16", "2/16", "3/16"),
            headline="2/16",
            reason="Two of the 16 grey levels of the data: strokes keep their shape. Under the suite `basic` about 15 % "
            "of the images survive in a vanilla ConvNet, about 70 % after adversarial training.",
        ),
        "l2": Budget(
            eps=("0.25", "0.5", "0.75"),
            headline="0.5",
            reason="Half the full range of one pixel, against a mean image norm of 3.9. About 40 % survive in a "
            "vanilla ConvNet under the suite `basic`, 70 % after adversarial training for linf.",
        ),
        "l1": Budget(
            eps=("1", "1.5", "2"),
            headline="1.5",
            reason="One and a half pixels from black to white, spread at will. About 30 % survive in a vanilla "
            "ConvNet under the suite `basic`, 45 % after adversarial training for linf.",
        ),
        "l0": Budget(
            eps=("1", "2", "3"),
            headline="2",
            reason="Two of 64 pixels, to any value: specks that a reader ignores. About 25 % survive in a vanilla "
            "ConvNet under the suite `basic`, 45 % after adversarial training for linf.",
        ),
    }

    mean: ClassVar[tuple[float, ...]] = (0.3057,)
    std: ClassVar[tuple[float, ...]] = (0.3764,)

    def __init__(self, batch_size: int = 64, *, num_workers: int = 0, val_fraction: float = 0.1, seed: int = 0) -> None:
        super().__init__(batch_size, num_workers=num_workers, val_fraction=val_fraction, seed=seed)
        self.setup("fit")  # nothing to download, so mistakes show now

    def read(self) -> tuple[ByteImages, ByteImages]:
        """Read both parts from the package."""
        images, labels, rest, test = embedded_digits()
        train, held_out = (
            # Sixteenths are exact in float32.
            ByteImages(images[k].unsqueeze(1), labels[k], levels=16)
            for k in (rest, test)
        )
        return train, held_out


def embedded_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read the digits of the package.

    Returns:
        Images (1797, 8, 8), uint8 in 0..16; labels (1797,), int64; the indices of the training and of the test images.
    """
    with files("sg_lightning.datamodules").joinpath("data/digits.npz").open("rb") as file:
        data = np.load(file)
        images, labels, test = data["images"], data["labels"], data["test"].astype(np.int64)
    rest = np.setdiff1d(np.arange(len(images)), test)
    return (
        torch.from_numpy(images),
        torch.from_numpy(labels).to(torch.int64),
        torch.from_numpy(rest),
        torch.from_numpy(test),
    )
