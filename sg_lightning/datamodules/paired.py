"""Pairs of samples of several data sets that show the same class, as dictionaries of modalities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sg_lightning.datamodules.base import Batch, SampleData, Samples
from sg_lightning.datamodules.digits import Digits
from sg_lightning.datamodules.saccade_digits import SaccadeDigits
from sg_lightning.datamodules.spoken_digits import SpokenDigits
from sg_lightning.inputs import Input
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import Budgets, JointBudget

# What a data set may know about the network of its modality.
_SIZES = ("in_channels", "input_size", "mean", "std", "in_features", "time_steps", "values")


class PairedSamples(Dataset[Batch]):
    """Samples of several sets put together by their places, given a whole batch at a time.

    Args:
        parts: Samples of each modality.
        places: Which sample of each modality a pair has, (N,) each.
        labels: (N,), int64.
        missing: Modalities whose values are all 0.
    """

    def __init__(
        self, parts: Mapping[str, Samples], places: Mapping[str, Tensor], labels: Tensor, missing: Sequence[str] = ()
    ) -> None:
        self.parts = dict(parts)
        self.places = dict(places)
        self.labels = labels
        self.missing = tuple(missing)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        x, y = self.__getitems__([index])
        return {name: part[0] for name, part in x.items()}, y[0]  # type: ignore[union-attr]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return a batch; the loader asks for it at once."""
        index = torch.as_tensor(indices)
        x: dict[str, Tensor] = {}
        for name, samples in self.parts.items():
            part = samples.__getitems__(self.places[name][index].tolist())[0]
            assert isinstance(part, Tensor)
            x[name] = torch.zeros_like(part) if name in self.missing else part
        return x, self.labels[index]

    def part(self, index: Tensor) -> PairedSamples:
        """Return the pairs of ``index``."""
        places = {name: place[index] for name, place in self.places.items()}
        return PairedSamples(self.parts, places, self.labels[index], self.missing)


class Paired(SampleData):
    """Pair samples of several data sets that show the same class: image, events and sound of one digit, for example.

    Every sample of the first set gets a partner of its class from each other set, drawn with ``seed``; partners are used
    equally often. Training samples are paired with training samples, validation with validation, test with test. A class is
    the label modulo ``num_classes``: of the 20 classes of SHD, ten per language, both with one digit are that digit.

    Args:
        sources: Data module of each modality, at least two.
        batch_size: Pairs per batch, at least 1.
        num_classes: Number of classes; ``None`` for the least that a source has.
        missing: Modalities without which validation and test samples come: their values are all 0. Not all of them.
        drop: Chance that a training sample loses one modality, each equally likely: its values become 0.
        num_workers: Loader processes; 0 is usually fastest.
        seed: Seed of the pairing and of the training order; splits have the seeds of the sources.

    Attributes:
        domain: Legal values of each modality.
        budgets: Those of each modality under ``<modality>_<norm>``, and ``joint``: half and all of the first budget of every
            modality at once.
        sizes: What each data set knows of the network of its modality, for
            :class:`~sg_lightning.backbones.FusionNet`.

    Shape:
        Batches of dictionaries of (B, ...) by modality, and labels (B,), int64.

    Raises:
        ValueError: on fewer than two sources, an argument out of range, or a class that a source lacks.
        TypeError: if a source is no data module of this library.
    """

    noun: ClassVar[str] = "pairs"

    def __init__(
        self,
        sources: dict[str, SampleData],
        batch_size: int = 64,
        *,
        num_classes: int | None = None,
        missing: tuple[str, ...] = (),
        drop: float = 0.0,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers=num_workers, seed=seed)
        if not isinstance(sources, Mapping) or len(sources) < 2:
            raise ValueError(f"sources must map at least two modalities to data modules, got {sources!r}")
        for name, source in sources.items():
            if not isinstance(source, SampleData) or isinstance(source, Paired):
                raise TypeError(f"the source of {name!r} must be a data module of one modality, got {source!r}")
        least = min(source.num_classes for source in sources.values())  # type: ignore[attr-defined]
        if num_classes is not None and (isinstance(num_classes, bool) or not 2 <= num_classes <= least):
            raise ValueError(f"num_classes must be an integer from 2 to {least}, got {num_classes!r}")
        if not 0.0 <= drop <= 1.0:
            raise ValueError(f"drop must be a chance in [0, 1], got {drop!r}")
        if not set(missing) < set(sources):
            raise ValueError(f"missing must name some of {', '.join(sources)}, but not all, got {tuple(missing)}")
        self.sources = dict(sources)
        self.stand_in = ", ".join(source.stand_in for source in sources.values() if source.stand_in)
        self.num_classes = least if num_classes is None else num_classes
        self.missing = tuple(missing)
        self.drop = drop
        self.input_shape = {name: source.input_shape for name, source in sources.items()}  # type: ignore[attr-defined]
        self.domain = {name: source.domain for name, source in sources.items()}  # type: ignore[attr-defined]

    @property
    def budgets(self) -> Budgets:
        """The budgets of the modalities that are not missing, and the joint one if there are several."""
        own = {name: source.budgets for name, source in self.sources.items() if name not in self.missing}  # type: ignore[attr-defined]
        found: Budgets = {f"{name}_{norm}": budget for name, all_ in own.items() for norm, budget in all_.items()}
        if len(own) > 1:
            first = tuple(f"{name}_{next(iter(all_))}" for name, all_ in own.items())
            reason = f"The headline budgets of {', '.join(first)} at once."
            found["joint"] = JointBudget((0.5, 1), 1, reason, of=first)
        return found

    @property
    def sizes(self) -> dict[str, dict[str, Any]]:
        """What each data set knows of the network of its modality, as plain values."""
        return {
            name: {key: _plain(getattr(source, key)) for key in _SIZES if getattr(source, key, None) is not None}
            for name, source in self.sources.items()
        }

    def prepare_data(self) -> None:
        """Download what is missing."""
        for source in self.sources.values():
            source.prepare_data()

    def read(self) -> tuple[Samples, Samples]:
        """Return the training samples (validation left out) and the test samples."""
        train, _, test = self.sets()
        return train, test

    def sets(self) -> tuple[Samples, Samples, Samples]:
        """Pair what trains, what validates and what tests."""
        for source in self.sources.values():
            source.setup("fit")
        return (
            self._paired({name: source.train_set for name, source in self.sources.items()}, 0),
            self._paired({name: source.val_set for name, source in self.sources.items()}, 1, self.missing),
            self._paired({name: source.test_set for name, source in self.sources.items()}, 2, self.missing),
        )

    def _paired(self, parts: dict[str, Samples], split: int, missing: Sequence[str] = ()) -> PairedSamples:
        first, *others = parts
        labels = parts[first].labels % self.num_classes
        places = {first: torch.arange(len(labels))}
        generator = torch.Generator().manual_seed((self.seed << 2) + split)
        for name in others:
            classes = parts[name].labels % self.num_classes
            place = torch.zeros_like(labels)
            for label in labels.unique().tolist():
                mine, theirs = (labels == label).nonzero().flatten(), (classes == label).nonzero().flatten()
                if len(theirs) == 0:
                    stage = ("training", "validation", "test")[split]
                    raise ValueError(f"{name!r} has no {stage} sample of class {label}, so {first!r} finds no partner")
                order = [
                    theirs[torch.randperm(len(theirs), generator=generator)]
                    for _ in range(-(-len(mine) // len(theirs)))
                ]
                place[mine] = torch.cat(order)[: len(mine)]
            places[name] = place
        return PairedSamples(parts, places, labels, missing)

    def augmented(self, x: Input, noise: SampleGenerator) -> Input:
        """Augment each modality as its data set does, and drop some."""
        assert isinstance(x, dict)
        changed: dict[str, Tensor] = {}
        for name, source in self.sources.items():
            part = source.augmented(x[name], noise.fork(name))
            assert isinstance(part, Tensor)
            changed[name] = part
        if self.drop:
            first = next(iter(changed.values()))
            chance, which = noise.fork("drop").uniform(first.new_empty(len(first), 2, dtype=torch.float64)).unbind(1)
            lost = torch.where(chance < self.drop, (which * len(changed)).long(), -1)
            for number, (name, part) in enumerate(changed.items()):
                changed[name] = part * (lost != number).to(part.dtype).view(-1, *[1] * (part.dim() - 1))
        return changed


class MultimodalDigits(Paired):
    """Load digits as image, events and sound: :class:`Digits`, :class:`SaccadeDigits` and :class:`SpokenDigits` in pairs.

    Shipped with the package: no download, no network. **Events and sound are stand-ins**, see there. An image and the
    events of its pair show one class, seldom one drawing; the same drawings train in both.

    Args:
        batch_size: Pairs per batch, at least 1.
        modalities: Which of ``image``, ``events`` and ``audio``, at least two; the first is the one that is not repeated.
        missing: As in :class:`Paired`.
        drop: As in :class:`Paired`.
        num_workers: Loader processes; 0 is fastest for data this small.
        val_fraction: Share of the training samples of each modality that validates, above 0 and below 1.
        seed: Seed of the splits, the pairing and the training order.

    Shape:
        Batches of ``{"image": (B, 1, 8, 8), "events": (B, 6, 2, 16, 16), "audio": (B, 50, 70)}`` and labels (B,), int64 in
        0..9.

    Raises:
        ValueError: on unknown or too few modalities, or an argument out of range.
    """

    def __init__(
        self,
        batch_size: int = 64,
        *,
        modalities: tuple[str, ...] = ("image", "events", "audio"),
        missing: tuple[str, ...] = (),
        drop: float = 0.0,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        kinds: dict[str, Any] = {"image": Digits, "events": SaccadeDigits, "audio": SpokenDigits}
        if not set(modalities) <= set(kinds) or len(set(modalities)) < 2:
            raise ValueError(f"modalities must be at least two of {', '.join(kinds)}, got {tuple(modalities)}")
        super().__init__(
            {name: kinds[name](batch_size, val_fraction=val_fraction, seed=seed) for name in modalities},
            batch_size, missing=tuple(missing), drop=drop, num_workers=num_workers, seed=seed,
        )  # fmt: skip
        self.val_fraction = val_fraction
        self.setup("fit")  # nothing to download, so mistakes show now


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
