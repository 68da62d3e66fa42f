"""PDSG: slopes as wide as the membranes are spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from sg_lightning.attacks.estimators.base import Memory, SingleEstimator
from sg_lightning.neurons import SlopeRule

Statistics = Literal["sample", "batch"]


@dataclass(frozen=True)
class PDSG(SingleEstimator, SlopeRule):
    """Back-propagate through time with potential-dependent slopes: the normal density N(u - threshold; sigma/2, sigma²).

    sigma is the standard deviation of the membranes of this and all earlier steps (1 where they are all equal).

    Args:
        statistics: ``"sample"``: sigma of each sample alone, over the space of each channel, or over all features of a
            layer without space. ``"batch"``: as published, sigma of each channel or feature over the whole batch and
            space. A sample's gradient then depends on the others: attacks drop no sample early, but results still
            depend on batch size, order, and on who was broken by earlier attacks of a suite.

    Raises:
        ValueError: on other statistics.

    Source:
        Lun et al., arXiv 2503.03272, and its public code. ``"sample"`` is ours.
    """

    statistics: Statistics = "sample"
    name: ClassVar[str] = "pdsg"

    def __post_init__(self) -> None:
        if self.statistics not in get_args(Statistics):
            raise ValueError(f"statistics must be one of {', '.join(get_args(Statistics))}, got {self.statistics!r}")

    @property
    def per_sample(self) -> bool:
        """Whether the statistics are."""
        return self.statistics == "sample"

    def rule(self, memory: Memory) -> SlopeRule:
        """Return itself: there is nothing to remember."""
        return self

    def slope(self, neuron: nn.Module, z: Tensor, past: Sequence[Tensor]) -> Tensor:
        """Return the density at one time step."""
        return _density(z, self._spread(torch.stack([*past, z]))[-1])

    def slopes(self, neuron: nn.Module, z: Tensor) -> Tensor:
        """Return the densities at all time steps."""
        return _density(z, self._spread(z))

    def _spread(self, z: Tensor) -> Tensor:
        """Return sigma up to each step, broadcastable to ``z`` (T, B, C, ...)."""
        space = tuple(range(3, z.dim()))
        pooled = (1, *space) if self.statistics == "batch" else space or (2,)
        variances, means = torch.var_mean(z, pooled, correction=0, keepdim=True)
        size = z[0].numel() // means[0].numel()
        # Steps are merged one by one (Chan et al.): exact where all membranes are equal.
        mean, squares = torch.zeros_like(means[0]), torch.zeros_like(means[0])
        spreads = []
        for before, (variance_t, mean_t) in enumerate(zip(variances.unbind(0), means.unbind(0), strict=True)):
            shift = mean_t - mean
            mean = mean + shift / (before + 1)
            squares = squares + size * (variance_t + shift.square() * before / (before + 1))
            sigma = (squares / max(size * (before + 1) - 1, 1)).sqrt()
            spreads.append(torch.where(sigma == 0, 1.0, sigma))
        return torch.stack(spreads)


def _density(z: Tensor, sigma: Tensor) -> Tensor:
    return (z / sigma).sub_(0.5).square_().mul_(-0.5).exp_().div_(sigma * math.sqrt(2 * math.pi))
