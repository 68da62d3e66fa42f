"""Scikit-learn's handwritten digits, shipped with the package."""

from __future__ import annotations

from importlib.resources import files
from typing import ClassVar

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from sg_lightning.domains import Box, Domain
from sg_lightning.threats import Budget

Batch = tuple[Tensor, ...]


class Digits(LightningDataModule):
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

    num_classes: ClassVar[int] = 10
    input_shape: ClassVar[tuple[int, ...]] = (1, 8, 8)
    domain: ClassVar[Domain] = Box()
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

    def __init__(self, batch_size: int = 64, *, num_workers: int = 0, val_fraction: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        images, labels, test = _load()
        rest = np.setdiff1d(np.arange(len(images)), test)
        held_out = round(val_fraction * len(rest)) if 0.0 < val_fraction < 1.0 else 0
        if not 0 < held_out < len(rest):
            raise ValueError(
                f"val_fraction must be above 0 and below 1 and leave images on both sides of {len(rest)}, "
                f"got {val_fraction!r}"
            )
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed)).numpy()
        self.train_set = _dataset(images, labels, rest[order[held_out:]])
        self.val_set = _dataset(images, labels, rest[order[:held_out]])
        self.test_set = _dataset(images, labels, test)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return shuffled training batches; a new loader starts the same order again."""
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return validation batches in a fixed order."""
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return test batches in a fixed order: the index of an image in it is its id."""
        return self._loader(self.test_set)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the test batches."""
        return self.test_dataloader()

    def _loader(self, data: TensorDataset, shuffle: bool = False) -> DataLoader[Batch]:
        return DataLoader(
            data,
            batch_size=self.batch_size,
            shuffle=shuffle,
            generator=torch.Generator().manual_seed(self.seed) if shuffle else None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


def _load() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read images (1797, 8, 8) uint8 in 0..16, labels and the indices of the test images."""
    with files("sg_lightning.datamodules").joinpath("data/digits.npz").open("rb") as file:
        data = np.load(file)
        return data["images"], data["labels"], data["test"].astype(np.int64)


def _dataset(images: np.ndarray, labels: np.ndarray, index: np.ndarray) -> TensorDataset:
    # Sixteenths are exact in float32.
    x = torch.from_numpy(images[index]).to(torch.float32).div(16).unsqueeze(1)
    return TensorDataset(x, torch.from_numpy(labels[index]).to(torch.int64))
