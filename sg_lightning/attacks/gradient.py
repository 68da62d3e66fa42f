"""FGSM, R-FGSM and PGD under any threat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sg_lightning.attacks.answers import check_labels
from sg_lightning.attacks.base import Attack, Progress
from sg_lightning.attacks.estimators import Memory
from sg_lightning.attacks.losses import Loss, get_loss
from sg_lightning.attacks.oracle import Oracle
from sg_lightning.attacks.runs import runs
from sg_lightning.attacks.search import Samples, column, finite, normalised, value, whole_number
from sg_lightning.inputs import Input, apply
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import Linf
from sg_lightning.threats.base import parse_eps


@dataclass(frozen=True)
class FGSM(Attack):
    """Maximise the linearised loss in one step: the sign step for L-infinity, its exact counterpart elsewhere.

    Args:
        threat: The allowed perturbations.
        loss: ``"ce"`` or ``"margin"``.

    Source:
        Goodfellow et al., arXiv 1412.6572 (L-infinity). Under the other threats the maximiser of the linear model in
        ball and domain.
    """

    loss: str = "ce"
    kind: ClassVar[str] = "fgsm"

    def __post_init__(self) -> None:
        super().__post_init__()
        get_loss(self.loss)

    def _start(self, x: Input, noise: SampleGenerator) -> Input:
        return x

    def _step(self, start: Input, grad: Input, x: Input) -> Input:
        return self.threat.maximise_linear(x, grad)

    def _search(
        self, oracle: Oracle, x: Input, y: Tensor, noise: SampleGenerator, progress: Progress, early_drop: bool
    ) -> None:
        everyone = torch.arange(len(y), device=y.device)
        start = self._start(x, noise)
        found = oracle.value_and_grad(start, y, get_loss(self.loss))
        check_labels(y, found.logits.shape[1])
        progress.record(everyone, start, found.loss, found.logits.argmax(1) != y, 0, oracle.passes, found)
        x_adv = self._step(start, found.grad, x)
        loss, wrong = value(oracle, x_adv, y, self.loss)
        # A single step has one answer: the stepped point, also where the start had the higher loss.
        progress.loss[~progress.success] = -torch.inf
        progress.record(everyone, x_adv, loss, wrong, 1, 1)


@dataclass(frozen=True)
class RFGSM(FGSM):
    """Take a random sign step of size ``alpha``, then an FGSM step of ``eps - alpha``; L-infinity only.

    Args:
        threat: An ``Linf`` threat.
        loss: ``"ce"`` or ``"margin"``.
        alpha: Size of the random step, 0 < alpha < eps in input units; ``None``: eps / 2.

    Source:
        Tramer et al., "Ensemble adversarial training", arXiv 1705.07204.
    """

    alpha: float | str | None = None
    kind: ClassVar[str] = "rfgsm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.threat, Linf):
            raise TypeError(f"R-FGSM is defined for L-infinity only, got {self.threat!r}; use PGD under other threats")
        if self.alpha is not None and not 0 < parse_eps(self.alpha, "alpha", shares=False) < self.threat.budget:
            raise ValueError(f"alpha must lie between 0 and eps={self.threat.eps}, got {self.alpha!r}")

    @property
    def _random_step(self) -> float:
        return self.threat.budget / 2 if self.alpha is None else parse_eps(self.alpha)

    def _start(self, x: Input, noise: SampleGenerator) -> Input:
        moved = apply(lambda t: t + self._random_step * noise.normal(t).sign(), x)
        return self.threat.project(moved, x)

    def _step(self, start: Input, grad: Input, x: Input) -> Input:
        rest = self.threat.budget - self._random_step
        return self.threat.project(self.threat.steepest_step(start, grad, x, rest), x)


@dataclass(frozen=True)
class PGD(Attack):
    """Ascend the loss by steepest steps, each projected exactly on ball and domain.

    Keeps the first success (SNN loss surfaces are not smooth, iterates leave the adversarial region again) and, for
    survivors, the point of highest loss. Restarts attack only the survivors. Under L0 and event budgets a step jumps
    to the best vertex for the running average of gradients and has no size.

    Args:
        threat: The allowed perturbations.
        steps: Gradient steps per restart, >= 1.
        step_size: Length of a step in the norm of the threat (L1: Euclidean); ``None``: 2.5 eps / steps, and
            falling linearly from eps (L1: 4 eps) to 0 under L2 and L1.
        restarts: Independent random starts, >= 1.
        random_start: Start at a random allowed point. With ``False`` the first restart starts clean.
        loss: ``"ce"``, or ``"margin"`` for models with huge logits.
        momentum: Weight of the previous gradients, 0 <= momentum < 1, each gradient divided by its mean absolute
            value; ``None``: 0, and 0.75 under L0 and event budgets.

    Raises:
        ValueError: on settings out of range.

    Source:
        Madry et al., arXiv 1706.06083; momentum: Dong et al., arXiv 1710.06081.
    """

    steps: int = 10
    step_size: float | str | None = None
    restarts: int = 1
    random_start: bool = True
    loss: str = "ce"
    momentum: float | None = None
    kind: ClassVar[str] = "pgd"
    abreast: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        get_loss(self.loss)
        whole_number("steps", self.steps, 1)
        whole_number("restarts", self.restarts, 1)
        if self.step_size is not None and parse_eps(self.step_size, "step_size", shares=False) == 0:
            raise ValueError("step_size must be above 0; leave it out for the default 2.5 eps / steps")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")

    @property
    def title(self) -> str:
        """``pgd-<steps>``, with ``x<restarts>`` if there are several."""
        return f"pgd-{self.steps}" + (f"x{self.restarts}" if self.restarts > 1 else "")

    def _search(
        self, oracle: Oracle, x: Input, y: Tensor, noise: SampleGenerator, progress: Progress, early_drop: bool
    ) -> None:
        # Already misclassified samples need no search; a clean start finds them by itself.
        clean = self.random_start and progress.goal == "success"
        for at, own in runs(
            oracle, x, y, noise, progress, early_drop, loss=self.loss, steps=self.steps, restarts=self.restarts,
            judge_clean=clean,
        ):  # fmt: skip
            self._begin(at)
            self._ascend(oracle, at, get_loss(self.loss), own, early_drop)

    def _begin(self, at: Samples) -> None:
        if self.random_start:
            at.point = self.threat.random_start(at.x, at.noise)
        elif bool(at.run.any()):
            start = self.threat.random_start(at.x, at.noise)
            at.point = apply(lambda t, clean: torch.where(column(at.run > 0, clean), t, clean), start, at.x)

    def _ascend(self, oracle: Oracle, at: Samples, loss: Loss, progress: Progress, early_drop: bool) -> None:
        """Climb ``loss`` of (logits, ``at.goal``) from ``at.point``; progress is judged by the untargeted loss."""
        at.memory, at.trend = Memory(), apply(torch.zeros_like, at.x)
        at.step = torch.zeros_like(at.index)
        decay = (0.75 if self.threat.discrete else 0.0) if self.momentum is None else self.momentum
        default, given = self.threat.default_step, self.step_size
        sizes = [default(self.steps, k) if given is None else parse_eps(given) for k in range(self.steps)]

        def look() -> None:
            found = oracle.value_and_grad(at.point, at.goal, loss, at.memory, at.rows)
            judged, wrong = get_loss(self.loss)(found.logits, at.y), found.logits.argmax(1) != at.y
            progress.record(at.index, at.point, judged, wrong, at.step, oracle.passes, found)
            at.gradient = finite(found.grad)

        def move(size: float) -> None:
            if decay:
                at.trend = apply(lambda m, g: decay * m + normalised(g), at.trend, at.gradient)
                at.gradient = at.trend
            at.point = self.threat.project(self.threat.steepest_step(at.point, at.gradient, at.x, size), at.x)
            at.step = at.step + 1

        def iterate() -> None:
            move(sizes[0])
            look()

        look()
        check_labels(at.y, oracle.classes)
        alike = len(set(sizes)) == 1
        with oracle.iterating(at, progress, self) as run:
            for size in sizes[:-1]:
                if early_drop:
                    oracle.drop(at, progress.open(at.index))
                    if len(at.index) == 0:
                        return
                if alike:
                    run(iterate)
                else:
                    move(size)
                    run(look)
        if early_drop:
            oracle.drop(at, progress.open(at.index))
            if len(at.index) == 0:
                return
        move(sizes[-1])
        judged, wrong = value(oracle, at.point, at.y, self.loss, at.rows)
        progress.record(at.index, at.point, judged, wrong, self.steps, 1)


@dataclass(frozen=True)
class MultiTargeted(PGD):
    """Run PGD towards each of the most likely wrong classes, climbing target logit minus true logit.

    Args:
        threat: The allowed perturbations.
        steps: Gradient steps per target and restart, >= 1.
        step_size: As in :class:`PGD`.
        restarts: Random starts per target, >= 1.
        random_start: As in :class:`PGD`.
        loss: What survivors are compared by; the default is the untargeted margin.
        momentum: As in :class:`PGD`.
        targets: How many classes, >= 1; at most the number of wrong classes counts.

    Raises:
        ValueError: on settings out of range.

    Source:
        Gowal et al., "An alternative surrogate loss for PGD-based adversarial testing", arXiv 1910.09338; the optimiser
        is PGD with steepest steps, theirs Adam on signs.
    """

    loss: str = "margin"
    targets: int = 9
    kind: ClassVar[str] = "multitargeted"
    abreast: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("targets", self.targets, 1)

    @property
    def title(self) -> str:
        """``multitargeted-<steps>t<targets>``, with ``x<restarts>`` if there are several."""
        return f"{self.kind}-{self.steps}t{self.targets}" + (f"x{self.restarts}" if self.restarts > 1 else "")

    def _search(
        self, oracle: Oracle, x: Input, y: Tensor, noise: SampleGenerator, progress: Progress, early_drop: bool
    ) -> None:
        for at, own in runs(
            oracle, x, y, noise, progress, early_drop, loss=self.loss, steps=self.steps, restarts=self.restarts,
            targets=self.targets,
        ):  # fmt: skip
            self._begin(at)
            self._ascend(oracle, at, get_loss("margin", targeted=True), own, early_drop)


@dataclass(frozen=True)
class RandomNoise(Attack):
    """The control: one random perturbation of full size, without looking at the model.

    Args:
        threat: The allowed perturbations.
        draws: Perturbations tried per sample, >= 1; a sample is broken if one of them is misclassified.
    """

    draws: int = 1
    kind: ClassVar[str] = "random"
    gradient_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("draws", self.draws, 1)

    def _search(
        self, oracle: Oracle, x: Input, y: Tensor, noise: SampleGenerator, progress: Progress, early_drop: bool
    ) -> None:
        everyone = torch.arange(len(y), device=y.device)
        for draw in range(self.draws):
            point = self.threat.sample(x, noise.fork("draw", draw))
            loss, wrong = value(oracle, point, y, "margin")
            progress.record(everyone, point, loss, wrong, draw + 1, 1)
