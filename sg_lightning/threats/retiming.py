"""Spikes may move in time: none appears, none vanishes, none leaves its line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from sg_lightning.domains import Binary, Domain
from sg_lightning.inputs import where
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import trains
from sg_lightning.threats.base import SingleThreat, is_share
from sg_lightning.threats.trains import Packets

Measure = Literal["inf", "1", "0"]


@dataclass(frozen=True)
class SpikeRetiming(SingleThreat):
    """Spikes may move along the time axis, at most one per line and bin; the spikes of each line are preserved.

    A line is one channel or pixel over time. On binary rasters every bin holds a spike or none. On counts a non-empty
    bin is a packet that moves with its whole value into an empty bin; packets neither merge nor split, and a move
    counts once whatever its value.

    The size of a change is the least that explains it. Spikes of equal value are matched in the order of time, which
    is cheapest in the sum and in the maximum of the shifts. The fewest moved spikes are those whose bin changed: an
    unchanged bin can always be matched with itself, because taking it out on both sides leaves as many spikes of each
    value, and a changed one cannot. On binary rasters they are half the bins that differ.

    Args:
        eps: Budget, a whole number. For ``"1"`` and ``"0"`` also a share of the sample's spikes such as ``"2%"``,
            rounded down.
        domain: ``Binary()`` or ``Counts()``.
        measure: ``"inf"``: the largest shift of a spike in steps; ``"1"``: the steps of all spikes together; ``"0"``:
            the number of spikes that move. The norm is called ``retime_inf``, ``retime_1`` or ``retime_0``.

    Shape:
        (B, T, ...) with time on axis 1.

    Raises:
        ValueError: on a bad eps or measure, or a domain of real values; at first use on a shift of T steps or more.

    Source:
        Yu et al., "Time is all it takes: spike-retiming attacks on event-driven spiking neural networks",
        arXiv 2602.03284. The sizes and, on binary rasters, projection and linear maximiser are exact here.
    """

    domain: Domain = Binary()  # noqa: RUF009 - frozen
    measure: Measure = "inf"
    norm: ClassVar[str] = "retime_inf"
    discrete: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.measure not in get_args(Measure):
            raise ValueError(f"measure must be one of {', '.join(get_args(Measure))}, got {self.measure!r}")
        object.__setattr__(self, "norm", f"retime_{self.measure}")
        object.__setattr__(self, "shares", self.measure != "inf")
        super().__post_init__()
        if not is_share(self.eps) and self.budget != round(self.budget):
            raise ValueError(f"SpikeRetiming counts steps or spikes: eps must be a whole number, got {self.eps!r}")
        if self.domain.lattice is None:
            raise ValueError(
                f"SpikeRetiming needs spikes, but the domain is {self.domain}: use domain=Binary() or Counts()"
            )

    def check(self, x: Tensor) -> None:  # type: ignore[override]
        """Raise ``ValueError`` if no spike can move that far."""
        if self.measure == "inf" and self.budget >= x.shape[1] > 1:
            raise ValueError(
                f"eps={self.eps} steps is longer than rasters of {x.shape[1]} steps, whose axis 1 must be time; got shape "
                f"{tuple(x.shape)}"
            )

    def _events(self, x: Tensor) -> Tensor:
        return (x != 0).flatten(1).sum(1)

    def targets(self, packets: Packets) -> Tensor:
        """Return the times (P, K) that each packet may look at."""
        return trains.shifted(packets, round(self.budget)) if self.measure == "inf" else trains.anywhere(packets)

    def schedule(self, packets: Packets, score: Tensor, limit: Tensor) -> Tensor:
        """Return the times (P,) of the packets when the best scores (P, K) of :meth:`targets` are served first.

        Args:
            packets: Of the clean raster.
            score: Of each target; ``-inf`` forbids it.
            limit: Budget of each sample, (B,).
        """
        target = self.targets(packets)
        if self.measure == "inf":
            return trains.place_within_reach(packets, score, target)
        distance = (target - packets.time.unsqueeze(1)).abs().double()
        cost = distance if self.measure == "1" else (distance > 0).double()
        return trains.place_within_budget(packets, score, cost, limit)

    def maximise_linear(self, x: Tensor, grad: Tensor) -> Tensor:  # type: ignore[override]
        """Return the allowed raster that maximises ``<grad, x_adv>``.

        Exact on binary rasters. On counts the most gainful moves are made first: packets of unequal value under a
        budget make the exact answer a hard assignment problem.
        """
        slope = trains.lines(grad.double())
        before = trains.lines(x)
        limit = self.limits(x)
        if self.domain.lattice == "binary":
            return trains.raster(self._best(before != 0, slope, limit), x)
        packets = Packets.of(before)
        target = self.targets(packets)
        stay = packets.gather(slope, packets.time.unsqueeze(1))
        gain = packets.value.double().unsqueeze(1) * (packets.gather(slope, target) - stay)
        worth = torch.where((gain > 0) | (target == packets.time.unsqueeze(1)), gain, -torch.inf)
        return trains.raster(packets.at(self.schedule(packets, worth, limit)), x)

    def _best(self, spikes: Tensor, slope: Tensor, limit: Tensor) -> Tensor:
        if self.measure == "inf":
            return trains.best_within_reach(spikes, slope, round(self.budget))
        if self.measure == "1":
            return trains.best_within_steps(spikes, slope, limit)
        return trains.best_moves(spikes, slope, limit)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the nearest allowed raster: all have the same length, so the one that maximises ``<x_adv, .>``."""
        return where(self.contains(x_adv, x), x_adv, self.maximise_linear(x, x_adv))  # type: ignore[return-value]

    def steepest_step(self, x_adv: Tensor, grad: Tensor, x: Tensor, step_size: float) -> Tensor:  # type: ignore[override]
        """Jump to the allowed raster that is best for ``grad`` (``step_size`` has no meaning here)."""
        return self.maximise_linear(x, grad)

    def sample(self, x: Tensor, generator: SampleGenerator) -> Tensor:  # type: ignore[override]
        """Serve the moves in random order, as many as budget and free bins allow."""
        packets = Packets.of(trains.lines(x))
        target = self.targets(packets)
        size = torch.bincount(packets.sample, minlength=len(x))
        place = torch.arange(len(packets.sample), device=x.device) - (size.cumsum(0) - size)[packets.sample]
        like = torch.empty(len(x), int(size.max()), target.shape[1], dtype=torch.float64, device=x.device)
        score = generator.uniform(like)[packets.sample, place]
        return trains.raster(packets.at(self.schedule(packets, score, self.limits(x))), x)

    def random_start(self, x: Tensor, generator: SampleGenerator) -> Tensor:  # type: ignore[override]
        """Start from the random control."""
        return self.sample(x, generator)

    def size(self, x_adv: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the least shift or number of moves that explains the change, (B,); infinite if nothing does."""
        shifts, matched = trains.least_shifts(trains.lines(x_adv), trains.lines(x))
        if self.measure == "inf":
            size = shifts.flatten(1).amax(1)
        elif self.measure == "1":
            size = shifts.flatten(1).sum(1)
        else:
            size = ((x != 0) & (x_adv != x)).flatten(1).sum(1)
        return torch.where(matched, size.double(), torch.inf)

    def _size(self, change: Tensor) -> Tensor:
        raise AssertionError("size() is overridden")  # pragma: no cover
