"""The spike-retiming attack: gradient ascent on the logits of shifts, through the projected raster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from sg_lightning.attacks.answers import check_labels
from sg_lightning.attacks.base import Attack, Progress
from sg_lightning.attacks.estimators import Memory
from sg_lightning.attacks.losses import get_loss
from sg_lightning.attacks.oracle import Oracle
from sg_lightning.attacks.search import Samples, finite, value, whole_number
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import SpikeRetiming
from sg_lightning.threats.trains import Packets, lines, place_at_favourite, raster


@dataclass(frozen=True)
class SpikeRetimingAttack(Attack):
    """Learn where each spike should go by sign steps on the logits of its shifts.

    Every spike has a softmax over its targets. The network sees the raster that the projection makes of them; the
    gradient is passed on as if it had seen the expected one (straight through). Two penalties keep the expectation
    feasible: the mean square of what exceeds one expected spike per bin, and how far the expected shifts or moves
    pass the budget, relative to it. Every projected raster counts, not only the last one.

    Under ``retime_inf`` the steps use the favourite shift of each spike and the last raster the best-first schedule,
    and the logits of shifts by at most one step start higher, as in the official code.

    Args:
        threat: A ``SpikeRetiming`` threat.
        steps: Gradient steps, >= 1; ``None``: 20 under ``retime_inf`` and 40 under the others.
        temperature: Of the softmax, above 0 (kappa).
        step_size: Change of a logit per step, above 0 (alpha).
        bound: Largest absolute logit, above 0 (phi_max).
        capacity_weight: Weight of the penalty on crowded bins, >= 0.
        budget_weight: Weight of the penalty on passing the budget, >= 0 (the official code uses 5 for ``retime_0``).
        loss: ``"ce"`` or ``"margin"``.

    Raises:
        TypeError: under another threat.
        ValueError: on settings out of range.

    Source:
        Yu et al., "Time is all it takes: spike-retiming attacks on event-driven spiking neural networks",
        arXiv 2602.03284.
    """

    steps: int | None = None
    temperature: float = 1.0
    step_size: float = 1.0
    bound: float = 10.0
    capacity_weight: float = 20.0
    budget_weight: float = 10.0
    loss: str = "ce"
    kind: ClassVar[str] = "retiming"
    abreast: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._retiming()
        get_loss(self.loss)
        if self.steps is None:
            object.__setattr__(self, "steps", 20 if self._retiming().measure == "inf" else 40)
        whole_number("steps", self.steps, 1)
        for name in ("temperature", "step_size", "bound"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        for name in ("capacity_weight", "budget_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)!r}")

    def _retiming(self) -> SpikeRetiming:
        if not isinstance(self.threat, SpikeRetiming):
            raise TypeError(f"the retiming attack moves spikes in time, got {self.threat!r}; use SpikeRetiming")
        return self.threat

    @property
    def title(self) -> str:
        """``retiming-<steps>``."""
        return f"retiming-{self.steps}"

    def _search(  # type: ignore[override]
        self, oracle: Oracle, x: Tensor, y: Tensor, noise: SampleGenerator, progress: Progress, early_drop: bool
    ) -> None:
        threat = self._retiming()
        everyone = torch.arange(len(y), device=y.device)
        loss, wrong = value(oracle, x, y, self.loss)
        progress.record(everyone, x, loss, wrong, 0, 1)
        at = Samples(
            index=everyone, x=x, y=y, memory=Memory(), limit=threat.limits(x), timing=_Timing.start(threat, x)
        )  # fmt: skip
        for step in range(cast("int", self.steps)):
            if early_drop:
                at.keep(progress.open(at.index))
            if len(at.index) == 0:
                return
            shares = at.timing.shares(self.temperature)
            if threat.measure == "inf":
                times = place_at_favourite(at.timing.packets, shares, at.timing.target)
            else:
                times = threat.schedule(at.timing.packets, shares, at.limit)
            at.point = raster(at.timing.packets.at(times), at.x)
            found = oracle.value_and_grad(at.point, at.y, get_loss(self.loss), at.memory, at.index)
            check_labels(at.y, found.logits.shape[1])
            progress.record(at.index, at.point, found.loss, found.logits.argmax(1) != at.y, step, oracle.eot, found)
            at.gradient = finite(found.grad)
            slope = self._slope(threat, at)
            at.timing.logits = (at.timing.logits + self.step_size * slope.sign()).clamp(-self.bound, self.bound)
        times = threat.schedule(at.timing.packets, at.timing.shares(self.temperature), at.limit)
        point = raster(at.timing.packets.at(times), at.x)
        loss, wrong = value(oracle, point, at.y, self.loss, at.index)
        progress.record(at.index, point, loss, wrong, cast("int", self.steps), 1)

    def _slope(self, threat: SpikeRetiming, at: Samples) -> Tensor:
        """Differentiate loss and penalties by the logits, (P, K)."""
        packets, target = at.timing.packets, at.timing.target
        logits = at.timing.logits.detach().requires_grad_()
        shares = (logits / self.temperature).softmax(1)
        expected = packets.spread(shares * packets.value.double().unsqueeze(1), target)
        crowd = (packets.spread(shares, target) - 1).clamp_min(0).square().sum() / at.x[0].numel()
        gain = (expected * lines(at.gradient).double()).sum() - self.capacity_weight * crowd
        if threat.measure != "inf":
            distance = (target - packets.time.unsqueeze(1)).abs().double()
            cost = (shares * (distance if threat.measure == "1" else distance.clamp_max(1))).sum(1)
            total = torch.zeros_like(at.limit).index_add(0, packets.sample, cost)
            gain = gain - self.budget_weight * ((total - at.limit).clamp_min(0) / at.limit.clamp_min(1)).sum()
        return torch.autograd.grad(gain, logits)[0]


class _Timing:
    """The packets of a batch, their targets (P, K) and the logits of these, cut together by sample."""

    def __init__(self, packets: Packets, target: Tensor, logits: Tensor) -> None:
        self.packets, self.target, self.logits = packets, target, logits

    @classmethod
    def start(cls, threat: SpikeRetiming, x: Tensor) -> _Timing:
        packets = Packets.of(lines(x))
        target = threat.targets(packets)
        logits = torch.zeros(target.shape, dtype=torch.float64, device=x.device)
        if threat.measure == "inf":
            logits[(target - packets.time.unsqueeze(1)).abs() <= 1] = 4.0
        return cls(packets, target, logits)

    def shares(self, temperature: float) -> Tensor:
        """Return the softmax over the targets, (P, K)."""
        return (self.logits / temperature).softmax(1)

    def select(self, mask: Tensor) -> _Timing:
        """Keep the samples where ``mask`` (B,) is true."""
        kept = mask[self.packets.sample]
        return _Timing(self.packets.select(mask), self.target[kept], self.logits[kept])
