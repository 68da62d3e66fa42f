"""Averages of several estimators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sg_lightning.attacks.estimators.base import Estimator, SingleEstimator
from sg_lightning.attacks.estimators.hart import HART
from sg_lightning.attacks.estimators.surrogate import BPTT


@dataclass(frozen=True)
class Mix(Estimator):
    """Average the gradients of several estimators, with equal weights and as they are.

    One forward and one backward pass each.

    Args:
        estimators: Two or more different estimators; none: the MIX attack of HART's source, HART and BPTT with the
            training surrogate.

    Raises:
        TypeError: if one is no estimator.
        ValueError: if there are fewer than two, or two are equal.

    Source:
        Hao et al., ICLR 2024, and its public code.
    """

    estimators: tuple[Estimator, ...] = ()
    name: ClassVar[str] = "mix"

    def __post_init__(self) -> None:
        object.__setattr__(self, "estimators", tuple(self.estimators) or (HART(), BPTT()))
        for estimator in self.estimators:
            if not isinstance(estimator, Estimator):
                raise TypeError(f"Mix takes estimators such as HART(), got {estimator!r}")
        if len(self.parts) < 2 or len(set(self.parts)) < len(self.parts):
            raise ValueError(f"Mix needs two or more estimators, all different, got {self.estimators!r}")

    @property
    def parts(self) -> tuple[SingleEstimator, ...]:
        """All parts of all estimators."""
        return tuple(part for estimator in self.estimators for part in estimator.parts)

    @property
    def per_sample(self) -> bool:
        """Whether it is so for all of them."""
        return all(estimator.per_sample for estimator in self.estimators)

    @property
    def label(self) -> str:
        """The labels of its estimators."""
        return "+".join(estimator.label for estimator in self.estimators)

    def describe(self) -> dict[str, Any]:
        """Return plain data that identifies the estimator."""
        return {"name": self.name, "estimators": [estimator.describe() for estimator in self.estimators]}
