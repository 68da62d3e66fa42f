"""Gradient attacks on few pixels: PGD0 and sparse-PGD."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

import torch
from torch import Tensor

from sg_lightning.attacks.answers import check_labels
from sg_lightning.attacks.base import Attack, Progress
from sg_lightning.attacks.estimators import Memory
from sg_lightning.attacks.losses import get_loss
from sg_lightning.attacks.oracle import Oracle
from sg_lightning.attacks.runs import runs
from sg_lightning.attacks.search import Samples, look_at, normalised, unit, value, whole_number
from sg_lightning.inputs import Input
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import L0
from sg_lightning.threats.base import parse_eps
from sg_lightning.threats.geometry import add_towards_zero

Variant = Literal["unprojected", "projected"]
STEP = 0.25  # of the width of the domain, and of the root of the number of pixels
PATIENCE = 3


@dataclass(frozen=True)
class _Sparse(Attack):
    """What the attacks on pixels share: one gradient per step, restarts on survivors, the first success is kept."""

    steps: int = 100
    restarts: int = 1
    loss: str = "ce"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.threat, L0):
            raise TypeError(f"{type(self).__name__} is defined under L0 only, got {self.threat!r}; use PGD")
        get_loss(self.loss)
        whole_number("steps", self.steps, 1)
        whole_number("restarts", self.restarts, 1)

    @property
    def title(self) -> str:
        """``<kind>-<steps>``, with ``x<restarts>`` if there are several."""
        return f"{self.kind}-{self.steps}" + (f"x{self.restarts}" if self.restarts > 1 else "")

    @property
    def _pixels(self) -> L0:
        return cast("L0", self.threat)

    def _search(
        self, oracle: Oracle, x: Input, y: Tensor, noise: SampleGenerator, progress: Progress, early_drop: bool
    ) -> None:
        for at, own in runs(
            oracle, x, y, noise, progress, early_drop, loss=self.loss, steps=self.steps, restarts=self.restarts
        ):
            self._ascend(oracle, at, own, early_drop)

    def _ascend(self, oracle: Oracle, at: Samples, progress: Progress, early_drop: bool) -> None:
        at.memory, at.step = Memory(), torch.zeros_like(at.index)
        self._begin(at)

        def look() -> None:
            look_at(oracle, at, progress, self.loss)

        look()
        check_labels(at.y, oracle.classes)
        with oracle.iterating(at, progress, self) as run:
            for step in range(self.steps):
                if early_drop:
                    oracle.drop(at, progress.open(at.index))
                    if len(at.index) == 0:
                        return
                self._advance(at, step)
                at.step = at.step + 1
                if step < self.steps - 1:
                    run(look)
        loss, wrong = value(oracle, at.point, at.y, self.loss, at.rows)
        progress.record(at.index, at.point, loss, wrong, self.steps, 1)

    @abstractmethod
    def _begin(self, at: Samples) -> None:
        """Set ``at.point`` and all other state of a run."""

    @abstractmethod
    def _advance(self, at: Samples, step: int) -> None:
        """Move ``at.point`` along ``at.gradient``."""


@dataclass(frozen=True)
class PGD0(_Sparse):
    """Take a long gradient step in all pixels, then keep the eps pixels whose undoing would cost most distance.

    Starts at a random input projected in the same way. Keeps the first success, for survivors the point of highest
    loss; restarts attack the survivors only. A baseline: pixels once changed are hard to leave, even on a linear model,
    so that SPGD, and PGD under L0, break more.

    Args:
        threat: An ``L0`` threat.
        steps: Gradient steps per restart, >= 1.
        restarts: Random starts, >= 1.
        loss: ``"ce"``, or ``"margin"`` for models with huge logits.
        step_size: Mean absolute change of a value by a step before the projection, above 0, in input units; ``None``:
            0.15 of the width of the domain, about the authors' 120000 / 255 for the sum over a CIFAR-10 image.

    Raises:
        TypeError: under other threats.
        ValueError: on settings out of range, or a domain of whole numbers.

    Source:
        Croce and Hein, "Sparse and imperceivable adversarial attacks", arXiv 1909.05040, under L0 and box constraints.
        Of equally good pixels the first are kept, where the authors add noise of 1e-12 to the step.
    """

    step_size: float | str | None = None
    kind: ClassVar[str] = "pgd0"
    abreast: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size is not None and parse_eps(self.step_size, "step_size") == 0:
            raise ValueError("step_size must be above 0; leave it out for the default")
        if self._pixels.domain.lattice is not None:
            raise ValueError(
                f"PGD0 moves most values by little, which rounds to nothing on {self._pixels.domain}: use SPGD or PGD"
            )

    def _begin(self, at: Samples) -> None:
        domain = self._pixels.domain
        at.point = self._pixels.project(at.noise.uniform(at.x, domain.low, domain.high), at.x)

    def _advance(self, at: Samples, step: int) -> None:
        size = 0.15 * self._pixels.domain.width if self.step_size is None else parse_eps(self.step_size)
        at.point = self._pixels.project(at.point + size * normalised(at.gradient), at.x)


@dataclass(frozen=True)
class SPGD(_Sparse):
    """Learn how pixels change and which of them change by separate gradient steps (sparse-PGD).

    A dense perturbation p moves by a quarter of the domain along the signs of its gradient. Mask logits m move by a
    quarter of the root of the number of pixels along their gradient of unit length, the gradient of p times sigmoid(m).
    The model sees p on the eps pixels with the largest logits. A mask that picks the same pixels three times in a row is
    drawn again. Keeps the first success, for survivors the point of highest loss.

    On lattices the model sees whole numbers, and gradients pass the rounding unchanged.

    Args:
        threat: An ``L0`` threat.
        steps: Gradient steps per restart, >= 1.
        restarts: Random starts, >= 1.
        loss: ``"ce"``, or ``"margin"`` for models with huge logits.
        variant: ``"unprojected"``: p moves everywhere. ``"projected"``: only on the pixels of the mask. The two break
            different samples: a strong test runs both.

    Raises:
        TypeError: under other threats.
        ValueError: on settings out of range.

    Source:
        Zhong, Huang and Liu, "Towards efficient training and evaluation of robust models against l0 bounded adversarial
        perturbations", arXiv 2405.05075. Repetitions are counted sample by sample as in the paper; in the authors' code
        a change in one sample resets the counts of the others. The mask stands still where its gradient is exactly
        zero, there below an absolute bound, which small logits do not reach.
    """

    variant: Variant = "unprojected"
    kind: ClassVar[str] = "spgd"
    abreast: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in get_args(Variant):
            raise ValueError(f"variant must be one of {', '.join(get_args(Variant))}, got {self.variant!r}")

    @property
    def title(self) -> str:
        """``spgd-<steps>``, with ``x<restarts>`` if there are several, and the variant."""
        return f"{super().title}-{self.variant}"

    def _begin(self, at: Samples) -> None:
        width = self._pixels.domain.width
        at.change = self._clipped(at.noise.fork("change").uniform(at.x.double(), -width, width).flatten(1), at.x)
        at.mask = at.noise.fork("mask").normal(self._pixels.per_pixel(torch.zeros_like(at.change), at.x.shape))
        at.repeats = torch.zeros_like(at.index)
        self._place(at)

    def _advance(self, at: Samples, step: int) -> None:
        slope = normalised(at.gradient.double()).flatten(1)
        chance = at.mask.sigmoid()
        pull = self._pixels.per_pixel(slope * at.change, at.x.shape) * chance * (1 - chance)
        moved = slope if self.variant == "unprojected" else slope * at.chosen
        at.change = self._clipped(at.change + STEP * self._pixels.domain.width * moved.sign(), at.x)
        at.mask = at.mask + STEP * pull.shape[1] ** 0.5 * unit(pull)
        before = at.chosen
        self._place(at)
        at.repeats = torch.where((at.chosen == before).all(1), at.repeats + 1, 0)
        stuck = at.repeats >= PATIENCE
        if bool(stuck.any()):
            at.mask = torch.where(stuck.unsqueeze(1), at.noise.fork("mask", step).normal(at.mask), at.mask)
            at.repeats = torch.where(stuck, 0, at.repeats)
            self._place(at)

    def _clipped(self, change: Tensor, x: Tensor) -> Tensor:
        """Keep the changed values in the domain; clipping to eps = its width is implied."""
        return self._pixels.domain.clip(x.double().flatten(1) + change) - x.double().flatten(1)

    def _place(self, at: Samples) -> None:
        """Choose the pixels of the mask and apply the change there."""
        rank = at.mask - at.mask.amin(1, keepdim=True) + 1.0
        at.chosen = self._pixels.choose(self._pixels.per_value(rank, at.x.shape), at.x.shape)
        shown = at.change.round() if self._pixels.domain.lattice is not None else at.change
        at.point = add_towards_zero(at.x, shown * at.chosen)
