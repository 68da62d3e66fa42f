"""HART: temporal slopes, averaged over time like a rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sg_lightning.attacks.estimators.base import Memory, SingleEstimator
from sg_lightning.neurons import BackwardRule, Trace
from sg_lightning.neurons.rules import Pullback
from sg_lightning.neurons.surrogates import Triangular


@dataclass(frozen=True)
class HART(SingleEstimator, BackwardRule):
    """Combine rate and temporal gradients: the slope at each step, no path from step to step, then the mean over time.

    dL/dx_t = mean over steps k of triangular(u_k - threshold) dL/ds_k, equal at all t.

    Args:
        gamma: Width of the triangular slope, above 0, in units of the membrane. The source takes, for each model, the
            best of 0.10, 0.15, ..., 2.45; do so on validation data (:func:`~sg_lightning.attacks.tune`).

    Raises:
        ValueError: if ``gamma`` is not above 0.

    Source:
        Hao et al., "Threaten spiking neural networks through combining rate and temporal information", ICLR 2024, and
        its public code. Its MIX is ``Mix()``.
    """

    gamma: float = 1.0
    name: ClassVar[str] = "hart"

    def __post_init__(self) -> None:
        self._check("gamma", 0.0, above=True)

    def rule(self, memory: Memory) -> BackwardRule:
        """Return itself: there is nothing to remember."""
        return self

    def pullback(self, trace: Trace) -> Pullback:
        """Return the mean over time of slope times upstream gradient."""
        phi = Triangular(self.gamma).derivative(trace.membranes - trace.threshold)

        def pull(grad: Tensor) -> Tensor:
            return (phi * grad).mean(0, keepdim=True).expand_as(phi)

        return pull
