"""ASSG: slopes whose sharpness follows each neuron along the attack."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor, nn

from sg_lightning.attacks.estimators.base import Memory, SingleEstimator
from sg_lightning.neurons import SlopeRule, Surrogate
from sg_lightning.neurons.surrogates import Atan, Gaussian, Rectangular, Sigmoid, Triangular

# The kernel k of each family, and its omega: the integral of k from 0 to omega is a.
FAMILIES: dict[str, tuple[Surrogate, Callable[[float], float]]] = {
    "atan": (Atan(1.0), lambda a: 2 * math.tan(math.pi * a) / math.pi),
    "sigmoid": (Sigmoid(1.0), lambda a: math.log((0.5 + a) / (0.5 - a))),
    "gaussian": (Gaussian(1.0), lambda a: NormalDist().inv_cdf(0.5 + a)),
    "triangular": (Triangular(1.0), lambda a: 1 - math.sqrt(1 - 2 * a)),
    "rectangular": (Rectangular(2.0), lambda a: 2 * a),
}


@dataclass(frozen=True)
class ASSG(SingleEstimator):
    """Back-propagate through time with adaptive sharpness.

    With u the membrane minus threshold of a sample's neuron at a time step, each iteration of the attack updates
    M <- decay M + (1 - decay) abs(u) and D <- decay D + (1 - decay) abs(abs(u) - M), from M = 1 and D = 0. The slope is
    alpha k(alpha u) with alpha = omega / (M + relax D + 0.0001), and omega so large that a neuron with abs(u) at that
    level has the share 2a of the kernel k's mass within [-u, u]: for ``"atan"`` omega = 2 tan(pi a) / pi.

    In an average over draws (``eot``) the first draw updates. A trajectory holds two numbers per neuron, step and sample.

    Args:
        a: Half the allowed expected degree of gradient vanishing, 0 < a < 1/2. The source chooses it for each model
            within [0.35, 0.49]; do so on validation data (:func:`~sg_lightning.attacks.tune`).
        family: Kernel: ``"atan"``, ``"sigmoid"``, ``"gaussian"``, ``"triangular"`` or ``"rectangular"``.
        relax: Weight of the deviation D, >= 0.
        decay: Weight of the past in M and D, 0 <= decay < 1.

    Raises:
        ValueError: on settings out of range.

    Source:
        Wang et al., arXiv 2512.22522, and its public code, which for kernels other than ``"atan"`` asks for omega itself.
    """

    a: float = 0.425
    family: str = "atan"
    relax: float = 1.5
    decay: float = 0.9
    name: ClassVar[str] = "assg"

    def __post_init__(self) -> None:
        self._check("a", 0.0, 0.5, above=True)
        self._check("relax", 0.0)
        self._check("decay", 0.0, 1.0)
        if self.family not in FAMILIES:
            raise ValueError(f"unknown family {self.family!r}; choose one of {', '.join(FAMILIES)}")

    @property
    def omega(self) -> float:
        """What alpha is when M + relax D is 1."""
        return FAMILIES[self.family][1](self.a)

    def rule(self, memory: Memory) -> SlopeRule:
        """Return slopes that follow what ``memory`` holds, and update it."""
        return _AdaptiveSlopes(self, memory)


class _AdaptiveSlopes(SlopeRule):
    """The slopes of one pass."""

    def __init__(self, settings: ASSG, memory: Memory) -> None:
        self.settings, self.memory = settings, memory
        self.kernel, self.omega = FAMILIES[settings.family][0], settings.omega
        self.visits: Counter[nn.Module] = Counter()  # a layer may serve in several places of a network

    def slope(self, neuron: nn.Module, z: Tensor, past: Sequence[Tensor]) -> Tensor:
        """Return the slopes of one time step."""
        key = (self.settings, neuron, self.visits[neuron])
        self.visits[neuron] += 1
        mean, spread = self._statistics(key, z.abs())
        alpha = torch.add(mean, spread, alpha=self.settings.relax).add_(1e-4).reciprocal_().mul_(self.omega)
        return self.kernel.derivative(alpha * z).mul_(alpha)

    def _statistics(self, key: Hashable, size: Tensor) -> tuple[Tensor, Tensor]:
        held, decay = self.memory.values, self.settings.decay
        first, second = ("mean", key), ("spread", key)
        mean, spread = held.get(first), held.get(second)
        if mean is None or spread is None:
            mean, spread = torch.ones_like(size), torch.zeros_like(size)
        if not self.memory.frozen:
            # Not in place: a pass that runs out of memory half-way is taken again, from what was held before.
            mean = held[first] = (mean * decay).add_(size, alpha=1 - decay)
            spread = held[second] = (spread * decay).add_(size.sub_(mean).abs_(), alpha=1 - decay)
        return mean, spread
