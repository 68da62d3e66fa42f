"""Attacks that need no gradient: random changes of the best point so far, kept where they raise the loss."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sg_lightning.attacks.base import Attack, Progress
from sg_lightning.attacks.losses import get_loss, higher
from sg_lightning.attacks.oracle import Oracle
from sg_lightning.attacks.search import Samples, value
from sg_lightning.inputs import Input, select, where
from sg_lightning.sampling import SampleGenerator

SCHEDULE = 10_000  # queries for which the papers wrote their schedules; stretched to the number that is spent


@dataclass(frozen=True)
class RandomSearch(Attack):
    """Base of random searches: logits only, so any function can be attacked, differentiable or not.

    The clean input is asked first and not counted among ``queries``. Every sample draws its own changes.

    Args:
        threat: The allowed perturbations.
        queries: Perturbed points tried per sample, >= 1.
        loss: ``"margin"`` (as the papers), or ``"ce"``.

    Raises:
        ValueError: on settings out of range.
    """

    queries: int = 5000
    loss: str = "margin"
    gradient_free: ClassVar[bool] = True
    sideways: ClassVar[bool] = False  # True: a change that leaves the loss as it is replaces the point too

    def __post_init__(self) -> None:
        super().__post_init__()
        get_loss(self.loss)
        if not isinstance(self.queries, int) or isinstance(self.queries, bool) or self.queries < 1:
            raise ValueError(f"queries must be a whole number >= 1, got {self.queries!r}")
        if self.estimator is not None:
            raise ValueError(f"{self.kind} takes no gradient, so it has no use for the estimator {self.estimator}")

    @property
    def title(self) -> str:
        """``<kind>-<queries>``."""
        return f"{self.kind}-{self.queries}"

    @abstractmethod
    def _start(self, at: Samples, noise: SampleGenerator) -> dict[str, Tensor]:
        """Return the first perturbed ``point`` and whatever else describes it; may add constants to ``at``."""

    @abstractmethod
    def _propose(self, at: Samples, query: int, noise: SampleGenerator) -> dict[str, Tensor]:
        """Return a changed ``point`` and its description, which replace those in ``at`` where the loss is higher."""

    def _search(
        self, oracle: Oracle, x: Input, y: Tensor, noise: SampleGenerator, progress: Progress, early_drop: bool
    ) -> None:
        everyone = torch.arange(len(y), device=y.device)
        loss, wrong = value(oracle, x, y, self.loss)
        progress.record(everyone, x, loss, wrong, 0, 1)
        index = everyone[progress.open(everyone)] if early_drop else everyone
        if len(index) == 0 or self.threat.budget == 0:
            return
        at = Samples(index=index, x=select(x, index), y=y[index], noise=noise.select(index))
        for query in range(self.queries):
            fork = at.noise.fork("query", query)
            found = self._propose(at, query, fork) if query else self._start(at, fork)
            loss, wrong = value(oracle, found["point"], at.y, self.loss, at.index)
            progress.record(at.index, found["point"], loss, wrong, query + 1, 1)
            better = (
                torch.ones_like(wrong)
                if query == 0
                else ~higher(at.loss, loss)
                if self.sideways
                else higher(loss, at.loss)
            )
            for name, part in {**found, "loss": loss}.items():
                setattr(at, name, where(better, part, getattr(at, name)) if query else part)
            if early_drop:
                at.keep(progress.open(at.index))
                if len(at.index) == 0:
                    return


def draw(noise: SampleGenerator, like: Tensor, *shape: int) -> Tensor:
    """Draw U[0, 1) in float64, (B, *shape) for the batch ``like`` (B, ...)."""
    return noise.uniform(like.new_empty(len(like), *shape, dtype=torch.float64))


def whole(uniform: Tensor, count: int) -> Tensor:
    """Turn U[0, 1) into whole numbers 0, ..., count - 1, equally likely."""
    return (uniform * count).long().clamp_max(count - 1)


def signs(uniform: Tensor) -> Tensor:
    """Turn U[0, 1) into -1 or 1, equally likely."""
    return torch.where(uniform < 0.5, -1.0, 1.0).to(uniform.dtype)
