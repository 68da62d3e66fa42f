"""Stable adaptive PGD: steps scaled value by value, for the rough loss surfaces of spiking networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sg_lightning.attacks.answers import check_labels
from sg_lightning.attacks.base import Attack, Progress
from sg_lightning.attacks.estimators import Memory
from sg_lightning.attacks.losses import get_loss
from sg_lightning.attacks.oracle import Oracle
from sg_lightning.attacks.runs import runs
from sg_lightning.attacks.search import Samples, column, look_at, normalised, value, whole_number
from sg_lightning.inputs import Input
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import Linf


@dataclass(frozen=True)
class SAPGD(Attack):
    """Divide a momentum of gradients by a running mean of their squares, value by value, and clip each step.

    The step starts at eps and is halved at Auto-PGD's checkpoints. Keeps the first success, for survivors the point of
    highest loss; restarts work on the survivors only.

    Args:
        threat: An ``Linf`` threat.
        steps: Gradient steps per restart, >= 1.
        restarts: Random starts, >= 1.
        loss: ``"ce"``, ``"dlr"`` or ``"margin"``.

    Raises:
        TypeError: under other threats.
        ValueError: on settings out of range.

    Source:
        Wang et al., arXiv 2512.22522, and the authors' code: momentum .5 of gradients over their mean absolute value,
        decay .8 of squares over their mean, steps clipped to the step size. Means run over all values of a sample.
    """

    steps: int = 100
    restarts: int = 1
    loss: str = "ce"
    kind: ClassVar[str] = "sapgd"
    abreast: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.threat, Linf):
            raise TypeError(f"SA-PGD is defined for L-infinity only, got {self.threat!r}; use APGD or PGD")
        get_loss(self.loss)
        whole_number("steps", self.steps, 1)
        whole_number("restarts", self.restarts, 1)

    @property
    def title(self) -> str:
        """``sapgd-<steps>``, then what differs from the default."""
        more = f"x{self.restarts}" if self.restarts > 1 else ""
        return f"{self.kind}-{self.steps}{more}" + (f"-{self.loss}" if self.loss != "ce" else "")

    def _search(
        self, oracle: Oracle, x: Input, y: Tensor, noise: SampleGenerator, progress: Progress, early_drop: bool
    ) -> None:
        for at, own in runs(
            oracle, x, y, noise, progress, early_drop, loss=self.loss, steps=self.steps, restarts=self.restarts
        ):
            at.point = self.threat.sample(at.x, at.noise)
            self._ascend(oracle, at, own, early_drop)

    def _ascend(self, oracle: Oracle, at: Samples, progress: Progress, early_drop: bool) -> None:
        at.memory = Memory()
        at.trend, at.squares = torch.zeros_like(at.x), torch.zeros_like(at.x)
        at.step = torch.zeros_like(at.index)
        at.size = torch.full_like(at.index, self.threat.budget, dtype=at.x.dtype)
        window, shortest, closer = (max(int(share * self.steps), 1) for share in (0.22, 0.06, 0.03))
        wait = window

        def look() -> None:
            look_at(oracle, at, progress, self.loss)

        def move() -> None:
            at.trend = 0.5 * at.trend + normalised(at.gradient)
            # Squares of the normalised gradient over their mean are those of the gradient over theirs, without underflow.
            at.squares = 0.8 * at.squares + normalised(normalised(at.gradient).square())
            size = column(at.size, at.x)
            moved = (at.trend / (at.squares.sqrt() + 1e-12) * size).clamp(-size, size)
            at.point = self.threat.project(at.point + moved, at.x)
            at.step = at.step + 1

        def iterate() -> None:
            move()
            look()

        look()
        check_labels(at.y, oracle.classes)
        with oracle.iterating(at, progress, self) as run:
            for step in range(self.steps):
                if early_drop:
                    oracle.drop(at, progress.open(at.index))
                    if len(at.index) == 0:
                        return
                if step < self.steps - 1:
                    run(iterate)
                else:
                    move()
                wait -= 1
                if wait == 0:
                    at.size = at.size / 2
                    window = max(window - closer, shortest)
                    wait = window
        loss, wrong = value(oracle, at.point, at.y, self.loss, at.rows)
        progress.record(at.index, at.point, loss, wrong, self.steps, 1)
