"""What every data module shares: seeded splits, and loaders whose order a checkpoint can continue."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from sg_lightning.inputs import Input
from sg_lightning.sampling import SampleGenerator

Batch: TypeAlias = tuple[Input, Tensor]


class Samples(Protocol):
    """Samples in memory or mapped from a file, given a whole batch at a time."""

    @property
    def labels(self) -> Tensor:
        """Labels (N,), int64."""

    def __len__(self) -> int:
        """Return N."""

    def __getitem__(self, index: int) -> Batch:
        """Return one sample and its label."""

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return a batch; the loader asks for it at once, which is far faster than sample by sample."""

    def part(self, index: Tensor) -> Samples:
        """Return the samples of ``index``."""


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

    def __init__(self, data: Samples, seed: int, processes: int = 1, rank: int = 0) -> None:
        super().__init__(data, processes, rank, seed=seed)  # type: ignore[arg-type] # torch asks for its class only
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


class SampleData(LightningDataModule):
    """Base of all data modules; a subclass reads the files.

    Args:
        batch_size: Samples per batch, at least 1.
        num_workers: Loader processes; samples in memory need none.
        val_fraction: Share of the training samples that validates, above 0 and below 1.
        seed: Seed of the validation split and of the training order.

    Attributes:
        num_classes: Number of classes.
        input_shape: Shape of one sample.
        domain: Legal values.
        budgets: The budgets of each norm that attacks use by default.
        stand_in: What the samples are made of if they only stand in for recordings, for the report; else empty.

    Raises:
        ValueError: on ``batch_size`` below 1, ``num_workers`` or ``seed`` below 0, or a ``val_fraction`` that leaves
            no sample for training or for validation.
    """

    noun: ClassVar[str] = "samples"
    stand_in: str = ""

    def __init__(
        self, batch_size: int = 128, *, num_workers: int = 0, val_fraction: float = 0.1, seed: int = 0
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        if not 0.0 < val_fraction < 1.0:
            raise ValueError(
                f"val_fraction must be above 0 and below 1 and leave {self.noun} on both sides, got {val_fraction!r}"
            )
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_fraction = val_fraction
        self.seed = seed
        self._sets: tuple[Samples, Samples, Samples] | None = None

    @abstractmethod
    def read(self) -> tuple[Samples, Samples]:
        """Return the training samples (validation included) and the test samples."""

    def setup(self, stage: str) -> None:
        """Read the samples, once."""
        self._split()

    def split(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return the indices of the training samples that train and that validate; drawn with ``seed``."""
        size = len(samples)
        held_out = round(self.val_fraction * size)
        if not 0 < held_out < size:
            raise ValueError(
                f"val_fraction must be above 0 and below 1 and leave {self.noun} on both sides of "
                f"{size}, got {self.val_fraction!r}"
            )
        order = torch.randperm(size, generator=torch.Generator().manual_seed(self.seed))
        return order[held_out:], order[:held_out]

    def sets(self) -> tuple[Samples, Samples, Samples]:
        """Return what trains, validates and tests; override it where the files say what validates."""
        rest, test = self.read()
        train, val = self.split(rest)
        return rest.part(train), rest.part(val), test

    def _split(self) -> tuple[Samples, Samples, Samples]:
        if self._sets is None:
            self._sets = self.sets()
        return self._sets

    @property
    def train_set(self) -> Samples:
        """The training samples."""
        return self._split()[0]

    @property
    def val_set(self) -> Samples:
        """The validation samples."""
        return self._split()[1]

    @property
    def test_set(self) -> Samples:
        """The test samples; the index of a sample is its id."""
        return self._split()[2]

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return training batches, shuffled anew every epoch; a new loader starts the same orders again."""
        processes, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        sampler = SeededShuffle(self.train_set, self.seed, processes, rank)
        return ResumableLoader(self.train_set, sampler=sampler, **self._options())  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return validation batches in a fixed order."""
        return DataLoader(self.val_set, **self._options())  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return test batches in a fixed order: the index of a sample in it is its id."""
        return DataLoader(self.test_set, **self._options())  # type: ignore[arg-type]

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

    def augmented(self, x: Input, noise: SampleGenerator) -> Input:
        """Change the inputs of a training batch at random, on its device; nothing by default."""
        return x

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment training batches, by draws that depend on seed, epoch and place in the batch of all processes."""
        trainer = self.trainer
        if trainer is None or not trainer.training:
            return batch
        x, y = batch
        place = torch.arange(len(y)) * trainer.world_size + trainer.global_rank
        step = trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return self.augmented(x, SampleGenerator.from_ids(self.seed, place).fork("augment", *step)), y


def _as_it_is(batch: Any) -> Any:
    return batch
