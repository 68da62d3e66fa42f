"""What every image data module shares: seeded splits, loaders, batched augmentation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from sg_lightning.domains import Box, Domain
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import Budget

Batch: TypeAlias = tuple[Tensor, Tensor]


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


class SeededShuffle(DistributedSampler[Batch]):
    """Draw an order that depends on seed and epoch only, so that a resumed run sees the batches it would have seen.

    Processes take turns in that order, so that N of them see the batches of one with N times the batch size; a few
    samples come twice where the shares would be unequal. Being a DistributedSampler, Lightning leaves it in place.

    Args:
        data: What to shuffle.
        seed: Seed of the orders.
        processes: Number of processes.
        rank: Number of this process.

    Attributes:
        skip: Samples that the next iteration leaves out at its start.
    """

    def __init__(self, data: ByteImages, seed: int, processes: int = 1, rank: int = 0) -> None:
        super().__init__(data, processes, rank, seed=seed)
        self.skip = 0

    def __iter__(self) -> Iterator[int]:  # type: ignore[override] # torch's types say samples, it gives indices
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type]
        order = order.repeat(-(-self.total_size // len(order)))[: self.total_size]
        start, self.skip = self.skip, 0
        self.epoch += 1  # Lightning calls set_epoch, other loops need not
        return iter(order[self.rank :: self.num_replicas][start:].tolist())


class ResumableLoader(DataLoader[Batch]):
    """A loader that a checkpoint can continue in the middle of an epoch; Lightning asks for its state.

    Its workers start, and the order is drawn, with the first batch: Lightning makes the iterator of the first epoch
    before it says which epoch that is.
    """

    _start = 0
    _given = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self._given, self._start = self._start, 0
        self.sampler.skip = self._given * (self.batch_size or 1)  # type: ignore[attr-defined]
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return how many batches of the epoch were given."""
        return {"batches": self._given % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Leave these batches out of the next epoch."""
        self._start = state["batches"]


class ImageData(LightningDataModule):
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
    budgets: ClassVar[dict[str, Budget]]
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
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        if not 0.0 < val_fraction < 1.0:
            raise ValueError(
                f"val_fraction must be above 0 and below 1 and leave images on both sides, got {val_fraction!r}"
            )
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_fraction = val_fraction
        self.seed = seed
        self.augment = augment
        self._sets: tuple[ByteImages, ByteImages, ByteImages] | None = None

    @property
    def in_channels(self) -> int:
        """Channels of an image, for the network."""
        return self.input_shape[0]

    @property
    def input_size(self) -> int:
        """Height and width of an image, for the network."""
        return self.input_shape[-1]

    @abstractmethod
    def read(self) -> tuple[ByteImages, ByteImages]:
        """Return the training images (validation included) and the test images."""

    def setup(self, stage: str) -> None:
        """Read the images, once."""
        self._split()

    def _split(self) -> tuple[ByteImages, ByteImages, ByteImages]:
        if self._sets is None:
            rest, test = self.read()
            held_out = round(self.val_fraction * len(rest))
            if not 0 < held_out < len(rest):
                raise ValueError(
                    "val_fraction must be above 0 and below 1 and leave images on both sides of "
                    f"{len(rest)}, got {self.val_fraction!r}"
                )
            order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(self.seed))
            self._sets = rest.part(order[held_out:]), rest.part(order[:held_out]), test
        return self._sets

    @property
    def train_set(self) -> ByteImages:
        """The training images."""
        return self._split()[0]

    @property
    def val_set(self) -> ByteImages:
        """The validation images."""
        return self._split()[1]

    @property
    def test_set(self) -> ByteImages:
        """The test images; the index of an image is its id."""
        return self._split()[2]

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return training batches, shuffled anew every epoch; a new loader starts the same orders again."""
        processes, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        sampler = SeededShuffle(self.train_set, self.seed, processes, rank)
        return ResumableLoader(self.train_set, sampler=sampler, **self._options())

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return validation batches in a fixed order."""
        return DataLoader(self.val_set, **self._options())

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return test batches in a fixed order: the index of an image in it is its id."""
        return DataLoader(self.test_set, **self._options())

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the test batches."""
        return self.test_dataloader()

    def _options(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "collate_fn": _as_it_is,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment training batches, by draws that depend on seed, epoch and place in the batch of all processes."""
        trainer = self.trainer
        if not self.augment or trainer is None or not trainer.training:
            return batch
        x, y = batch
        place = torch.arange(len(y)) * trainer.world_size + trainer.global_rank
        step = trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready
        noise = SampleGenerator.from_ids(self.seed, place).fork("augment", *step)
        return augmented(x, self.shift, self.mirror, noise), y


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


def _as_it_is(batch: Any) -> Any:
    return batch
