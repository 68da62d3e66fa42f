"""What every image data module shares: images as bytes, and augmentation by the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from sg_lightning.datamodules.base import Batch, SampleData
from sg_lightning.domains import Box, Domain
from sg_lightning.inputs import Input
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import Budgets


class ByteImages(Dataset[Batch]):
    """Images kept in memory as bytes and given as float32 in [0, 1], a whole batch at a time.

    Args:
        images: (N, C, H, W), uint8 in 0..``levels``.
        labels: (N,), int64.
        levels: The byte that stands for 1.
    """

    def __init__(self, images: Tensor, labels: Tensor, levels: int = 255) -> None:
        self.images = images
        self.labels = labels
        self.levels = levels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return self.images[index].float() / self.levels, self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return a batch; the loader asks for it at once, which is far faster than image by image."""
        index = torch.as_tensor(indices)
        return self.images[index].float() / self.levels, self.labels[index]

    def part(self, index: Tensor) -> ByteImages:
        """Return the images of ``index``."""
        return ByteImages(self.images[index], self.labels[index], self.levels)


class ImageData(SampleData):
    """Base of the image data modules; a subclass reads the files.

    Args:
        batch_size: Images per batch, at least 1.
        num_workers: Loader processes; the images are in memory, so 0 is usually fastest.
        val_fraction: Share of the training images that validates, above 0 and below 1.
        seed: Seed of the validation split and of the training order.
        augment: Shift training images at random by up to ``shift`` pixels and, where a mirror image keeps its
            meaning, mirror half of them; on the device, a batch at a time.

    Attributes:
        num_classes: Number of classes.
        input_shape: Channels, height, width.
        domain: Legal values, [0, 1].
        budgets: The budgets of each norm that attacks use by default.
        mean: Channel means of the training images, for normalisation inside the model.
        std: Channel standard deviations.

    Shape:
        Batches of images (B, C, H, W), float32 in [0, 1], and labels (B,), int64.

    Raises:
        ValueError: on ``batch_size`` below 1, ``num_workers`` or ``seed`` below 0, or a ``val_fraction`` that leaves
            no image for training or for validation.
    """

    num_classes: ClassVar[int] = 10
    input_shape: ClassVar[tuple[int, ...]]
    domain: ClassVar[Domain] = Box()
    budgets: ClassVar[Budgets]
    noun: ClassVar[str] = "images"
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]
    shift: ClassVar[int] = 0
    mirror: ClassVar[bool] = False

    def __init__(
        self,
        batch_size: int = 128,
        *,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        seed: int = 0,
        augment: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers=num_workers, val_fraction=val_fraction, seed=seed)
        self.augment = augment

    @property
    def in_channels(self) -> int:
        """Channels of an image, for the network."""
        return self.input_shape[0]

    @property
    def input_size(self) -> int:
        """Height and width of an image, for the network."""
        return self.input_shape[-1]

    def augmented(self, x: Input, noise: SampleGenerator) -> Input:
        """Shift and mirror training images, if so wanted."""
        return augmented(x, self.shift, self.mirror, noise) if self.augment else x  # type: ignore[arg-type]


def augmented(x: Tensor, shift: int, mirror: bool, noise: SampleGenerator) -> Tensor:
    """Shift each image of a batch (B, C, H, W) by its own offset, filling with zeros, and mirror half of them."""
    size, _, height, width = x.shape
    if shift:
        moved = noise.fork("shift").uniform(x.new_empty(size, 2), high=2 * shift + 1).long().t().unsqueeze(2)
        rows = moved[0] + torch.arange(height, device=x.device)
        columns = moved[1] + torch.arange(width, device=x.device)
        batch = torch.arange(size, device=x.device).view(-1, 1, 1)
        # Indexing around the channels puts them last.
        x = pad(x, [shift] * 4)[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
    if mirror:
        chosen = noise.fork("mirror").uniform(x.new_empty(size, 1)) < 0.5
        x = torch.where(chosen.view(-1, 1, 1, 1), x.flip(-1), x)
    return x
