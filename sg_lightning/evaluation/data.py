"""Tensors, a loader or a data module as batches with sample ids."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from sg_lightning.domains import Domain, Domains, check_values
from sg_lightning.inputs import Input, apply, batch_size, select


class Source:
    """Batches ``(x, y, ids)`` of a test set, in its order.

    Args:
        data: ``(x, y)`` tensors, a sequential ``DataLoader``, or a data module with ``test_dataloader()``.
        max_samples: Only the first so many samples.

    Raises:
        ValueError: on a shuffling loader, or batches that are not (x, y).
        TypeError: on anything else.
    """

    def __init__(self, data: Any, max_samples: int | None = None) -> None:
        if max_samples is not None and max_samples < 1:
            raise ValueError(f"max_samples must be >= 1 or None, got {max_samples}")
        self.domain = getattr(data, "domain", None)
        self.budgets = getattr(data, "budgets", None)
        self.limit = math.inf if max_samples is None else max_samples
        self.pair: tuple[Input, Tensor] | None = None
        self.loader: Any = None
        if hasattr(data, "test_dataloader"):
            data.prepare_data()
            data.setup("test")
            self.loader = data.test_dataloader()
        elif isinstance(data, DataLoader):
            self.loader = data
        elif isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor):
            self.pair = (data[0], data[1])
            if batch_size(data[0]) != len(data[1]):
                raise ValueError(f"{batch_size(data[0])} inputs but {len(data[1])} labels; give one label per input")
        else:
            raise TypeError(
                "data must be a pair of tensors (x, y), a DataLoader or a data module with test_dataloader(), got "
                f"{type(data).__name__}"
            )
        sampler = getattr(self.loader, "sampler", None)
        if self.loader is not None and (
            isinstance(sampler, RandomSampler) or not isinstance(sampler, SequentialSampler)
        ):
            raise ValueError(
                f"the loader draws its samples with a {type(sampler).__name__}, but a sample's id is its position in the "
                "data set: build it with DataLoader(dataset, shuffle=False)"
            )

    def __len__(self) -> int:
        size = batch_size(self.pair[0]) if self.pair is not None else len(self.loader.dataset)
        return int(min(size, self.limit))

    def check(self, domain: Domains) -> None:
        """Check tensors at once; a loader's samples are checked batch by batch as they come.

        Raises:
            ValueError: on an empty test set, NaN, values outside the domain, or labels that do not fit.
        """
        if len(self) == 0:
            raise ValueError("the test set is empty: nothing to attack")
        if self.pair is not None:
            check_samples(*self.pair, domain)

    def batches(self, size: int) -> Iterator[tuple[Input, Tensor, Tensor]]:
        """Yield ``(x, y, ids)``; pairs in batches of ``size``, loaders in their own."""
        start = 0
        for x, y in self._raw(size):
            keep = min(batch_size(x), len(self) - start)
            index = torch.arange(keep, device=y.device)
            yield select(x, index), y[:keep], torch.arange(start, start + keep)
            start += keep
            if start >= len(self):
                return

    def _raw(self, size: int) -> Iterator[tuple[Input, Tensor]]:
        if self.pair is not None:
            x, y = self.pair
            for index in torch.arange(batch_size(x)).split(size):
                yield select(x, index), y[index]
            return
        for batch in self.loader:
            if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
                raise ValueError("batches must be pairs (x, y) of inputs and labels")
            yield batch[0], batch[1]


def legal_domain(given: Domains | None, data: Any) -> Domains:
    """Return the domain that was given, else that of the data, else [0, 1]; one for each modality of dictionaries.

    Raises:
        ValueError: if the data are whole numbers and the given domain hides that: its perturbations would pass as feasible;
            or if only one of the two is by modality.
    """
    own: Domains | None = getattr(data, "domain", None)
    if given is None or own is None:
        return given or own or Domain()
    if isinstance(given, dict) != isinstance(own, dict):
        raise ValueError(f"domain={given}, but that of the data is {own}: give one domain for each modality, or none")
    pairs = (
        [(given.get(k), v) for k, v in own.items()]
        if isinstance(own, dict) and isinstance(given, dict)
        else [(given, own)]
    )
    for one, other in pairs:
        if isinstance(one, Domain) and isinstance(other, Domain) and other.lattice is not None and one.lattice is None:
            raise ValueError(
                f"domain={one}, but the data live in {other}: leave domain out and name relaxed norms in the budgets "
                "('relaxed_linf', ...), whose figures are marked infeasible"
            )
    return given


def data_name(data: Any) -> str:
    """Name a data module for the record, and say if it stands in for real recordings; nothing for other data."""
    if not hasattr(data, "test_dataloader"):
        return ""
    stand_in = getattr(data, "stand_in", "")
    return type(data).__name__ + (f" (stand-in: {stand_in})" if stand_in else "")


def check_samples(x: Input, y: Tensor, domain: Domains | None) -> None:
    """Raise ``ValueError`` with the cure on NaN, values outside the domain, or labels that do not fit."""
    if y.dim() != 1 or y.is_floating_point() or len(y) != batch_size(x):
        raise ValueError(
            f"expected integer labels of shape ({batch_size(x)},), got {y.dtype} of shape {tuple(y.shape)}"
        )
    if len(y) and int(y.min()) < 0:
        raise ValueError(f"labels must be >= 0, got {int(y.min())}")
    check_values(x, domain, "the test data")


def to_device(x: Input, device: torch.device) -> Input:
    """Move every tensor of an input."""
    return apply(lambda t: t.to(device), x)
