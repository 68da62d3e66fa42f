"""Auto-PGD: steps that shrink when they stop to pay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sg_lightning.attacks.base import Attack, Progress
from sg_lightning.attacks.estimators import Memory
from sg_lightning.attacks.losses import get_loss, higher
from sg_lightning.attacks.oracle import Oracle
from sg_lightning.attacks.runs import runs
from sg_lightning.attacks.search import Samples, column, finite, value, whole_number
from sg_lightning.inputs import Input
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import L1, L2, Linf, Threat


@dataclass(frozen=True)
class APGD(Attack):
    """Ascend with momentum, halving the step and going back to the best point when progress stalls.

    Under L1 steps move the fraction of values with the largest gradients, a fraction that follows the sparsity of the
    best point, and 60 % of the steps are spent in balls of three and two times eps, whose points are projected. Three
    times in each of these balls the best point is also projected on the threat itself and asked for, which costs six
    forward passes and lets samples that are already broken go. Keeps the first success, for survivors the point of
    highest loss; restarts and targets work on the survivors only.

    Args:
        threat: ``Linf``, ``L2`` or ``L1``.
        steps: Gradient steps per restart and target, >= 1.
        restarts: Random starts, >= 1.
        loss: ``"ce"``, ``"dlr"`` (the margin where there are too few classes) or ``"margin"``.
        targets: 0: untargeted. Else a run for each of the so many most likely wrong classes, with the targeted form
            of the loss; at most the number of wrong classes counts.
        rho: Share of steps that must raise the loss for the step size to stay, in (0, 1).

    Raises:
        TypeError: under other threats.
        ValueError: on settings out of range.

    Source:
        Croce and Hein, arXiv 2003.01690; L1: arXiv 2103.01208. As in their code the step shrinks also where exactly
        the share rho of steps paid. The looks from larger balls are ours. The projection is the exact one on ball and
        box for L2 too, where theirs clips after projecting.
    """

    steps: int = 100
    restarts: int = 1
    loss: str = "ce"
    targets: int = 0
    rho: float = 0.75
    kind: ClassVar[str] = "apgd"
    abreast: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.threat, Linf | L2 | L1):
            raise TypeError(f"APGD is defined under Linf, L2 and L1, got {self.threat!r}; use PGD under other threats")
        get_loss(self.loss)
        whole_number("steps", self.steps, 1)
        whole_number("restarts", self.restarts, 1)
        whole_number("targets", self.targets, 0)
        if not 0 < self.rho < 1:
            raise ValueError(f"rho must be between 0 and 1, got {self.rho!r}")

    @property
    def title(self) -> str:
        """``apgd-<steps>``, then what differs from the default, e.g. ``apgd-100x5-dlr-t9``."""
        return (
            f"{self.kind}-{self.steps}"
            + (f"x{self.restarts}" if self.restarts > 1 else "")
            + (f"-{self.loss}" if self.loss != "ce" else "")
            + (f"-t{self.targets}" if self.targets else "")
        )

    def _search(
        self, oracle: Oracle, x: Input, y: Tensor, noise: SampleGenerator, progress: Progress, early_drop: bool
    ) -> None:
        for at, own in runs(
            oracle, x, y, noise, progress, early_drop, loss=self.loss, steps=self.steps, restarts=self.restarts,
            targets=self.targets,
        ):  # fmt: skip
            climb = self._climb_sparse if isinstance(self.threat, L1) else self._climb
            climb(oracle, at, own, early_drop)

    def _climb(self, oracle: Oracle, at: Samples, progress: Progress, early_drop: bool) -> None:
        at.point = self.threat.sample(at.x, at.noise)
        _Momentum(self.threat, self.steps, self.rho).ascend(self, oracle, at, progress, early_drop)

    def _climb_sparse(self, oracle: Oracle, at: Samples, progress: Progress, early_drop: bool) -> None:
        share, done = int(0.3 * self.steps), 0
        at.point = self.threat.with_eps(3 * self.threat.budget).sample(at.x, at.noise)
        for factor, steps in ((3.0, share), (2.0, share), (1.0, self.steps - 2 * share)):
            if not steps or not len(at.index):
                continue
            # The last ball is the threat itself, whose eps is exact.
            ball = self.threat if factor == 1 else self.threat.with_eps(factor * self.threat.budget)
            at.point = ball.project(at.point, at.x)
            _Sparse(ball, steps, fresh=done == 0).ascend(
                self, oracle, at, progress, early_drop, done, count=factor == 1
            )
            at.point = at.best
            done += steps


class _Schedule:
    """How a run steps and when its step size changes; all state of samples lives in ``Samples``."""

    def __init__(self, threat: Threat, steps: int) -> None:
        self.threat = threat
        self.steps = steps

    def ascend(
        self, attack: APGD, oracle: Oracle, at: Samples, progress: Progress, early_drop: bool, done: int = 0, *,
        count: bool = True,
    ) -> None:  # fmt: skip
        """Ascend from ``at.point``, leaving the best point in ``at.best``; points count only inside the threat."""
        at.memory = Memory()
        at.step = torch.full_like(at.index, done)

        def look(*, gradient: bool = True) -> None:
            loss, found = get_loss(attack.loss, targeted=attack.targets > 0), None
            if gradient:
                found = oracle.value_and_grad(at.point, at.goal, loss, at.memory, at.rows)
                logits, at.loss, at.gradient = found.logits, found.loss.double(), finite(found.grad)
            else:
                logits = oracle.logits(at.point, at.rows)
                at.loss = loss(logits, at.goal).double()
            queries = oracle.passes if gradient else 1
            if count:
                judged = get_loss(attack.loss)(logits, at.y)
                progress.record(at.index, at.point, judged, logits.argmax(1) != at.y, at.step, queries, found)
            else:
                progress.discard(at.index, at.step, queries, found)

        def look_inside() -> None:
            point = attack.threat.project(at.best, at.x)
            progress.record(at.index, point, *value(oracle, point, at.y, attack.loss, at.rows), at.step, 1)

        def iterate(*, gradient: bool = True) -> None:
            at.point = self.step(at, step)
            at.step = at.step + 1
            look(gradient=gradient)
            better = higher(at.loss, at.best_loss)
            at.best = torch.where(column(better, at.x), at.point, at.best)
            at.best_gradient = torch.where(column(better, at.x), at.gradient, at.best_gradient)
            at.best_loss = torch.where(better, at.loss, at.best_loss)
            at.rises = at.rises + higher(at.loss, at.before)
            at.before = at.loss

        look()
        at.best, at.best_loss, at.best_gradient, at.before = at.point, at.loss, at.gradient, at.loss
        self.begin(at)
        wait = self.window
        with oracle.iterating(at, progress, attack, self.threat, count) as run:
            for step in range(self.steps):
                if early_drop:
                    oracle.drop(at, progress.open(at.index))
                    if len(at.index) == 0:
                        return
                last = step == self.steps - 1
                if last:
                    iterate(gradient=False)
                else:
                    run(iterate, step > 0)  # the first step has no momentum
                if not count and (step + 1) % max(self.steps // 3, 1) == 0:
                    look_inside()
                wait -= 1
                if wait == 0 and not last:
                    back = self.adapt(at)
                    at.point = torch.where(column(back, at.x), at.best, at.point)
                    at.gradient = torch.where(column(back, at.x), at.best_gradient, at.gradient)
                    at.rises = torch.zeros_like(at.rises)
                    wait = self.window

    window: int

    def begin(self, at: Samples) -> None:
        """Give the samples their state."""
        at.rises = torch.zeros(len(at.index), dtype=torch.int64, device=at.y.device)

    def step(self, at: Samples, number: int) -> Tensor:
        """Return the next point."""
        raise NotImplementedError

    def adapt(self, at: Samples) -> Tensor:
        """Change step sizes after a window; return who goes back to the best point, bool (B,)."""
        raise NotImplementedError


class _Momentum(_Schedule):
    """L-infinity and L2: momentum, and steps halved at checkpoints that come closer together."""

    def __init__(self, threat: Threat, steps: int, rho: float) -> None:
        super().__init__(threat, steps)
        self.rho = rho
        self.window, self.shortest, self.closer = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))

    def begin(self, at: Samples) -> None:
        """Start at twice eps."""
        super().begin(at)
        at.size = torch.full_like(at.loss, 2 * self.threat.budget)
        at.last, at.checked, at.halved = at.point, at.best_loss, torch.ones_like(at.loss, dtype=torch.bool)

    def step(self, at: Samples, number: int) -> Tensor:
        """Take three quarters of a steepest step and a quarter of the last move."""
        unit = self.threat.steepest_step(at.point, at.gradient, at.x, 1.0) - at.point
        straight = self.threat.project(at.point + column(at.size, at.x).to(at.x.dtype) * unit, at.x)
        share = 0.75 if number else 1.0
        mixed = at.point + share * (straight - at.point) + (1 - share) * (at.point - at.last)
        at.last = at.point
        return self.threat.project(mixed, at.x)  # type: ignore[return-value]

    def adapt(self, at: Samples) -> Tensor:
        """Halve where too few steps paid, or where neither the best loss nor the step has changed since the last time."""
        stuck = ~at.halved & ~higher(at.best_loss, at.checked)
        back = (at.rises <= self.rho * self.window) | stuck
        at.size = torch.where(back, at.size / 2, at.size)
        at.checked, at.halved = at.best_loss, back
        self.window = max(self.window - self.closer, self.shortest)
        return back


class _Sparse(_Schedule):
    """L1: steps along the signs of the largest gradients, as many as the sparsity of the best point suggests."""

    def __init__(self, threat: Threat, steps: int, fresh: bool) -> None:
        super().__init__(threat, steps)
        self.window = max(int(0.04 * steps), 1)
        self.fresh = fresh

    def begin(self, at: Samples) -> None:
        """Start with a fifth of the values, or the sparsity of where the last stage ended."""
        super().begin(at)
        values = at.x[0].numel()
        at.size = torch.full_like(at.loss, self.threat.budget)
        at.changed = torch.full_like(at.loss, values) if self.fresh else _changed(at.point, at.x)
        at.share = torch.full_like(at.loss, 0.2) if self.fresh else at.changed / values / 1.5

    def step(self, at: Samples, number: int) -> Tensor:
        """Move the values whose gradients are among the share of largest ones, all by the same amount."""
        size = at.gradient.abs().flatten(1)
        values = size.shape[1]
        place = ((1 - at.share) * values).clamp(0, values - 1).long()
        bar = size.sort(dim=1).values.gather(1, place.unsqueeze(1))
        signs = at.gradient.flatten(1).sign() * (size >= bar)
        step = signs * (at.size / signs.abs().sum(1).double().clamp_min(1e-10)).to(at.x.dtype).unsqueeze(1)
        return self.threat.project(at.point + step.view_as(at.x), at.x)  # type: ignore[return-value]

    def adapt(self, at: Samples) -> Tensor:
        """Start again with long steps where the best point has become sparser, else shorten them."""
        changed = _changed(at.best, at.x)
        sparser = changed < 0.95 * at.changed
        longest = self.threat.budget
        at.size = torch.where(sparser, longest, at.size / 1.5).clamp(longest / 10, longest)
        at.share, at.changed = changed / at.x[0].numel() / 1.5, changed
        return sparser


def _changed(point: Tensor, x: Tensor) -> Tensor:
    """Count the values that differ, float64 (B,)."""
    return (point != x).flatten(1).sum(1).double()
