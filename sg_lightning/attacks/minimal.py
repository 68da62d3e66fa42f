"""Minimal-norm attacks: the smallest adversarial example of every sample."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from sg_lightning.attacks.answers import Gradient, check_labels
from sg_lightning.attacks.base import Attack, AttackResult, Goal, Progress
from sg_lightning.attacks.estimators import Memory
from sg_lightning.attacks.losses import get_loss
from sg_lightning.attacks.oracle import Oracle
from sg_lightning.attacks.search import Samples, finite, unit, value, whole_number
from sg_lightning.inputs import Input, assign, detached, select
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import L0, L1, L2, Linf, SingleThreat, Threat
from sg_lightning.threats.geometry import add_towards_zero


class Smallest(Progress):
    """The smallest adversarial example so far of every sample; ``size`` (B,) is infinite where there is none."""

    def __init__(self, x: Input, threat: Threat) -> None:
        super().__init__(x, "success")
        self.x = detached(x)
        self.threat = threat
        self.size = torch.full_like(self.loss, torch.inf)

    def record(
        self,
        index: Tensor,
        x_adv: Input,
        loss: Tensor,
        wrong: Tensor,
        iteration: int | Tensor,
        queries: int,
        found: Gradient | None = None,
    ) -> None:
        """Keep what is misclassified and smaller than what is held; a sample of size 0 is done."""
        searched = self._spend(index, iteration, queries, found)
        size = self.threat.size(x_adv, select(self.x, index)).double()
        # Points on the surface of one ball have the same size: rounding must not choose between them.
        better = searched & wrong & (size < self.size[index] * (1 - 1e-9))
        kept = index[better]
        assign(self.x_adv, kept, select(x_adv, better))
        self.size[kept] = size[better]
        self.success[kept] = size[better] == 0
        update = better | (searched & torch.isinf(self.size[index]) & (size == 0))  # the loss is that of ``x_adv``
        self.loss[index[update]] = loss[update].double()
        self._mark(index, found)

    def result(self) -> AttackResult:
        """Freeze into a result; success needs the budget too."""
        return replace(super().result(), success=self.success & self.threat.contains(self.x_adv, self.x))


@dataclass(frozen=True)
class MinimalNorm(Attack):
    """Base of the attacks that walk along the decision boundary towards the clean input.

    The search does not depend on eps: eps only decides which of the examples found count as success.
    """

    steps: int = 100
    minimal: ClassVar[bool] = True
    threats: ClassVar[tuple[type[SingleThreat], ...]]
    loss: ClassVar[str] = "margin"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.threat, self.threats):
            known = ", ".join(threat.__name__ for threat in self.threats)
            raise TypeError(f"{type(self).__name__} is defined under {known}, got {self.threat!r}")
        domain = self._ball.domain
        if domain.lattice is not None or math.isinf(domain.width):
            raise ValueError(
                f"{type(self).__name__} moves values by any amount between two walls, but the domain is {domain}: on "
                "binary inputs and counts use SPGD or PGD under L0 or EventFlips"
            )
        whole_number("steps", self.steps, 1)

    @property
    def title(self) -> str:
        """``<kind>-<steps>``."""
        return f"{self.kind}-{self.steps}"

    @property
    def _ball(self) -> Linf | L2 | L1 | L0:
        return cast("Linf | L2 | L1 | L0", self.threat)

    def _progress(self, x: Input, goal: Goal) -> Progress:
        if goal == "loss":
            raise ValueError(
                f"{self.name} looks for the smallest adversarial examples, not for the highest loss in a ball; train with "
                "PGD, for example"
            )
        return Smallest(x, self.threat)

    def _search(
        self, oracle: Oracle, x: Input, y: Tensor, noise: SampleGenerator, progress: Progress, early_drop: bool
    ) -> None:
        assert isinstance(progress, Smallest)
        if oracle.stochastic:
            raise ValueError(
                f"{self.name} needs a model that always answers the same: near the decision boundary of a random model the "
                "smallest example found is a lucky draw; use PGD or APGD with eot and votes"
            )
        everyone = torch.arange(len(y), device=y.device)
        at = Samples(index=everyone, x=x, y=y, point=x, noise=noise, memory=Memory())
        self._begin(at)
        for step in range(self.steps):
            found = oracle.value_and_grad(at.point, at.y, get_loss(self.loss), at.memory, at.index)
            check_labels(at.y, found.logits.shape[1])
            at.wrong, at.loss = found.logits.argmax(1) != at.y, found.loss.double()
            progress.record(at.index, at.point, at.loss, at.wrong, step, oracle.passes, found)
            at.gradient, at.best = finite(found.grad), progress.size[at.index]
            if early_drop:
                at.keep(progress.open(at.index))
            if len(at.index) == 0:
                break
            self._advance(at, step)
        else:
            loss, wrong = value(oracle, at.point, at.y, self.loss, at.index)
            progress.record(at.index, at.point, loss, wrong, self.steps, 1)
        progress.success = torch.isfinite(progress.size) & ~progress.invalid

    @abstractmethod
    def _begin(self, at: Samples) -> None:
        """Give the samples their state; the search starts at the clean inputs."""

    @abstractmethod
    def _advance(self, at: Samples, step: int) -> None:
        """Move ``at.point``, knowing ``gradient``, ``loss``, ``wrong``, and ``best``, the smallest size so far."""

    def _farthest(self, x: Tensor) -> Tensor:
        """Return the distance (B,) to the farthest point of the domain."""
        low, high = self._ball.domain.low, self._ball.domain.high
        return self._ball.size(torch.where(x - low > high - x, low, high).to(x.dtype), x)


def annealed(start: float, end: float, share: float) -> float:
    """Fall from ``start`` to ``end`` along half a cosine wave; ``share`` of the way is done."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class DDN(MinimalNorm):
    """Decouple direction and norm: step along the gradient, then rescale to a norm that shrinks on success, else grows.

    Args:
        threat: An ``L2`` threat.
        steps: Gradient steps, >= 1.
        gamma: Relative change of the norm per step, between 0 and 1.

    Raises:
        TypeError: under other threats.
        ValueError: on settings out of range, or a domain that is not a box.

    Source:
        Rony et al., "Decoupling direction and norm for efficient gradient-based L2 adversarial attacks and defenses",
        arXiv 1811.09600. Values are not quantised; lengths are in units of the width of the domain; a direction that
        replaces a zero gradient has unit length.
    """

    gamma: float = 0.05
    kind: ClassVar[str] = "ddn"
    threats: ClassVar[tuple[type[SingleThreat], ...]] = (L2,)
    loss: ClassVar[str] = "ce"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gamma < 1:
            raise ValueError(f"gamma must be between 0 and 1, got {self.gamma!r}")

    def _begin(self, at: Samples) -> None:
        at.change = torch.zeros_like(at.x, dtype=torch.float64).flatten(1)
        at.farthest = self._farthest(at.x)
        at.norm = torch.full_like(at.farthest, self._ball.domain.width)

    def _advance(self, at: Samples, step: int) -> None:
        width = self._ball.domain.width
        direction = unit(at.gradient)
        lost = (direction == 0).all(1, keepdim=True)
        if bool(lost.any()):
            direction = torch.where(lost, unit(at.noise.fork("direction", step).normal(direction)), direction)
        at.norm = torch.minimum(at.norm * torch.where(at.wrong, 1 - self.gamma, 1 + self.gamma), at.farthest)
        moved = at.change + annealed(width, 0.01 * width, step / self.steps) * direction
        moved = moved * (at.norm / moved.norm(dim=1).clamp_min(torch.finfo(moved.dtype).tiny)).unsqueeze(1)
        clean = at.x.double().flatten(1)
        at.change = self._ball.domain.clip(clean + moved) - clean
        at.point = add_towards_zero(at.x, at.change)


@dataclass(frozen=True)
class FMN(MinimalNorm):
    """Step along the gradient, then project on a ball whose size follows the decision boundary.

    Before the first success the ball reaches just past the boundary of the linearised margin, afterwards it shrinks on
    success and grows on failure, by factors that fall along a cosine. Under L0 it changes by at least one pixel.

    Args:
        threat: ``Linf``, ``L2``, ``L1`` or ``L0``.
        steps: Gradient steps, >= 1.
        step_size: Euclidean length of the first step in units of the width of the domain, above 0; falls along a
            cosine to a hundredth.
        gamma: Relative change of the ball at the first step, between 0 and 1; falls along a cosine to 0.001.

    Raises:
        TypeError: under other threats.
        ValueError: on settings out of range, or a domain that is not a box.

    Source:
        Pintor et al., "Fast minimum-norm adversarial attacks through adaptive norm constraints", arXiv 2102.12827,
        starting at the clean input. The projection is the exact one on ball and box, where the authors clip to the box
        afterwards. Before the first success the ball is larger by gamma than the authors', which ends exactly on the
        boundary and under L2 never crosses that of a linear model. Under ``unit="pixels"`` L0 counts pixels, there
        single values.
    """

    step_size: float = 1.0
    gamma: float = 0.05
    kind: ClassVar[str] = "fmn"
    threats: ClassVar[tuple[type[SingleThreat], ...]] = (Linf, L2, L1, L0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.step_size > 0 or math.isinf(self.step_size):
            raise ValueError(f"step_size must be above 0 and finite, got {self.step_size!r}")
        if not 0 < self.gamma < 1:
            raise ValueError(f"gamma must be between 0 and 1, got {self.gamma!r}")

    def _begin(self, at: Samples) -> None:
        at.farthest = self._farthest(at.x)
        at.eps = torch.full_like(at.farthest, 1.0 if self._ball.discrete else torch.inf)

    def _advance(self, at: Samples, step: int) -> None:
        share = step / self.steps
        gamma = annealed(self.gamma, 0.001, share)
        size = annealed(self.step_size, self.step_size / 100, share) * self._ball.domain.width
        smaller, larger = at.eps * (1 - gamma), at.eps * (1 + gamma)
        if self._ball.discrete:
            smaller = torch.minimum(at.eps - 1, smaller.floor())
            larger = torch.maximum(at.eps + 1, larger.floor())
        else:
            reach = self._ball.size(at.point, at.x) + self._to_boundary(at)
            larger = torch.where(torch.isinf(at.best), reach * (1 + gamma), larger)
        at.eps = torch.where(at.wrong, torch.minimum(smaller, at.best), larger).clamp_min(0.0)
        at.eps = torch.minimum(at.eps, at.farthest)
        moved = at.point.double() + (size * unit(at.gradient)).view(at.x.shape)
        at.point = self._ball.project(moved, at.x, at.eps)

    def _to_boundary(self, at: Samples) -> Tensor:
        """Return how far (B,) the margin's linearisation says the boundary is: margin over the dual norm of its slope."""
        order = next(dual for kind, dual in ((Linf, 1), (L2, 2), (L1, math.inf)) if isinstance(self._ball, kind))
        slope = torch.linalg.vector_norm(at.gradient.double().flatten(1), ord=order, dim=1)
        return at.loss.abs() / slope.clamp_min(torch.finfo(slope.dtype).tiny)


@dataclass(frozen=True)
class SigmaZero(MinimalNorm):
    """Descend margin and a smooth count of changed values together, setting small changes to zero after each step.

    Changes below a threshold are undone; the threshold of a sample rises while it is misclassified and falls otherwise.

    Args:
        threat: An ``L0`` threat.
        steps: Gradient steps, >= 1.
        step_size: First step size of Adam in units of the width of the domain, above 0; falls along a cosine to a tenth.
        sigma: Sharpness of the smooth count d^2 / (d^2 + sigma), above 0.
        threshold: First threshold in units of the width of the domain, in [0, 1]; it moves by a hundredth of the step
            size.

    Raises:
        TypeError: under other threats.
        ValueError: on settings out of range, or a domain that is not a box.

    Source:
        Cina et al., "sigma-zero: gradient-based optimization of l0-norm adversarial examples", arXiv 2402.01879. Under
        ``unit="pixels"`` d is the Euclidean length of a pixel's change, so that pixels are counted and undone as a
        whole; the paper counts single values. The margin and the count are added as they are: with logits far smaller
        than 1 / (number of pixels) the count outweighs the margin.
    """

    step_size: float = 1.0
    sigma: float = 1e-3
    threshold: float = 0.3
    kind: ClassVar[str] = "sigma_zero"
    threats: ClassVar[tuple[type[SingleThreat], ...]] = (L0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("step_size", "sigma"):
            given: Any = getattr(self, name)
            if not 0 < given < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {given!r}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {self.threshold!r}")

    def _begin(self, at: Samples) -> None:
        at.change = torch.zeros_like(at.x, dtype=torch.float64).flatten(1)  # in units of the width
        at.mean, at.square = torch.zeros_like(at.change), torch.zeros_like(at.change)
        at.bar = torch.full_like(at.change[:, 0], self.threshold)

    def _advance(self, at: Samples, step: int) -> None:
        threat = cast("L0", self.threat)
        width, shape = threat.domain.width, at.x.shape
        squares = threat.per_pixel(at.change.square(), shape)
        count = 2 * at.change * threat.per_value(self.sigma / (squares + self.sigma).square(), shape) / squares.shape[1]
        margin = at.gradient.double().flatten(1) * width
        slope = count - torch.where(at.wrong.unsqueeze(1), 0.0, margin)
        slope = slope / slope.abs().amax(1, keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
        # Adam
        at.mean = 0.9 * at.mean + 0.1 * slope
        at.square = 0.999 * at.square + 0.001 * slope.square()
        mean, square = at.mean / (1 - 0.9 ** (step + 1)), at.square / (1 - 0.999 ** (step + 1))
        size, following = (annealed(self.step_size, self.step_size / 10, s / self.steps) for s in (step, step + 1))
        clean = at.x.double().flatten(1)
        moved = threat.domain.clip(clean + width * (at.change - size * mean / (square.sqrt() + 1e-8))) - clean
        at.bar = (at.bar + 0.01 * following * torch.where(at.wrong, 1.0, -1.0)).clamp(0.0, 1.0)
        length = threat.per_pixel((moved / width).square(), shape).sqrt()
        at.change = moved / width * threat.per_value((length >= at.bar.unsqueeze(1)).double(), shape)
        at.point = add_towards_zero(at.x, at.change * width)
