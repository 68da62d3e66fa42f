"""Rate-based gradients: each neuron multiplies what comes back by one factor, at all time steps alike.

Nothing flows through the membrane from step to step. BPTR and Act see whether a neuron is active at all, RGA sees
where its mean current lies on its curve of firing rate.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sg_lightning.attacks.estimators.base import Memory, SingleEstimator
from sg_lightning.neurons import BackwardRule, Trace
from sg_lightning.neurons.rules import Pullback


@dataclass(frozen=True)
class RateEstimator(SingleEstimator, BackwardRule):
    """Base: dL/dx_t = gain dL/ds_t."""

    @abstractmethod
    def gain(self, trace: Trace) -> Tensor:
        """Return the factor of each neuron, (B, ...)."""

    def rule(self, memory: Memory) -> BackwardRule:
        """Return itself: there is nothing to remember."""
        return self

    def pullback(self, trace: Trace) -> Pullback:
        """Return the multiplication by the gains."""
        gain = self.gain(trace)
        return lambda grad: grad * gain


@dataclass(frozen=True)
class BPTR(RateEstimator):
    """Back-propagate through rates: 1 for a neuron that fired at least once, else 0.

    Source:
        Ding et al., "SNN-RAT", NeurIPS 2022, and its public code.
    """

    name: ClassVar[str] = "bptr"

    def gain(self, trace: Trace) -> Tensor:
        """Return 1 where the neuron fired, else 0."""
        return trace.spikes.amax(0)


@dataclass(frozen=True)
class Act(RateEstimator):
    """Back-propagate through a ReLU of the mean current: 1 where it is above 0, else 0.

    In the source's ensemble of attacks, whose networks are converted from ReLU networks, this member attacks the ReLU
    network itself. Here, as with every estimator, the forward pass and so the loss stay those of the spiking network;
    the ReLU sees the neuron's mean current over time.

    Source:
        Ozdenizci and Legenstein, arXiv 2311.09266, and its public code.
    """

    name: ClassVar[str] = "act"

    def gain(self, trace: Trace) -> Tensor:
        """Return 1 where the mean current is above 0, else 0."""
        return (mean_current(trace) > 0).to(trace.membranes.dtype)


@dataclass(frozen=True)
class RGA(RateEstimator):
    """Approximate the gradient of the firing rate by that of a curve of the mean current over time.

    In units of the threshold, and with the leak beta, the curve is piecewise linear through (0, 0), the onset of
    regular firing (1 - beta, gamma (1 - beta)), and (saturation, 1): the gain is gamma before the onset,
    (1 - gamma (1 - beta)) / (saturation - 1 + beta) after it, and 0 outside [0, saturation]. Without leak it is 1/2 on
    [0, 2].

    Args:
        gamma: Gain before the onset, >= 0: the neuron fires irregularly or not at all.
        saturation: Mean current in thresholds, above 1, from which the neuron fires at every step.

    Raises:
        ValueError: on settings out of range.

    Source:
        Bu et al., "Rate gradient approximation attack threats deep spiking neural networks", CVPR 2023, and its public
        code, whose constants are the defaults. Beyond it: thresholds other than 1 (currents are divided by them), and
        at a current of exactly the onset one piece counts, not the sum of both. Its time-extended variant, which
        simulates for longer, is not included.
    """

    gamma: float = 0.2
    saturation: float = 2.0
    name: ClassVar[str] = "rga"

    def __post_init__(self) -> None:
        self._check("gamma", 0.0)
        self._check("saturation", 1.0, above=True)

    def gain(self, trace: Trace) -> Tensor:
        """Return the slope of the curve at the mean current."""
        drive, onset = mean_current(trace) / trace.threshold, 1 - trace.beta
        late = (1 - self.gamma * onset) / (self.saturation - onset)
        slope = self.gamma + (late - self.gamma) * (drive >= onset)
        return slope * ((drive >= 0) & (drive <= self.saturation)) / trace.threshold


def mean_current(trace: Trace) -> Tensor:
    """Return the mean input current over time, (B, ...)."""
    return trace.currents.mean(0, dtype=trace.membranes.dtype)
