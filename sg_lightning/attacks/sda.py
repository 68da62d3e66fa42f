"""The sparse dynamic attack on binary rasters: generate flips by true differences, then take back what is not needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sg_lightning.attacks.answers import Gradient, check_labels
from sg_lightning.attacks.base import Attack, Progress
from sg_lightning.attacks.estimators import Memory
from sg_lightning.attacks.flips import best_first, require_binary, require_flips, try_events
from sg_lightning.attacks.losses import margin
from sg_lightning.attacks.oracle import Oracle
from sg_lightning.attacks.search import Samples, finite, value, whole_number
from sg_lightning.sampling import SampleGenerator


@dataclass(frozen=True)
class SDA(Attack):
    """Collect flips that lower the margin by themselves until the sample is misclassified, then undo all it can spare.

    Round n evaluates the ``first`` x n cells not yet flipped that have the largest gradient among those whose flip the
    gradient favours (a vanished gradient is replaced by tiny noise), and flips all that do not raise the loss
    max(0, true logit - best other) by themselves; after a success a binary search over the flips, smallest
    difference first, finds how many can be undone. The published attack takes the gradient with PDSG: give it as
    ``estimator``.

    The search knows no budget: it runs as published and a sample is broken if the reduced example fits the threat. So
    a loose budget costs no more than a tight one, and only points within it are reported. Unlike in the official
    code, flipped cells are never candidates again, not even when a round has room for all.

    Args:
        threat: An ``EventFlips`` threat on ``Binary()``; its mode restricts the candidates.
        rounds: Most rounds of generation N, >= 1.
        first: Candidates of the first round k, >= 1.

    Raises:
        TypeError: under another threat.
        ValueError: on settings out of range, or a domain that is not binary.

    Source:
        Lun et al., "Towards effective and sparse adversarial attack on spiking neural networks via breaking invisible
        surrogate gradients", arXiv 2503.03272: N = 500, k = 10.
    """

    rounds: int = 500
    first: int = 10
    kind: ClassVar[str] = "sda"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("rounds", self.rounds, 1)
        whole_number("first", self.first, 1)
        require_binary(require_flips(self), "SDA")

    @property
    def title(self) -> str:
        """``sda-<rounds>``."""
        return f"sda-{self.rounds}"

    def _search(  # type: ignore[override]
        self, oracle: Oracle, x: Tensor, y: Tensor, noise: SampleGenerator, progress: Progress, early_drop: bool
    ) -> None:
        threat = require_flips(self)
        able = threat.growing(x, x).view(len(y), 2, -1).any(1)
        at = Samples(
            index=torch.arange(len(y), device=y.device), x=x, y=y, point=x, able=able, memory=Memory(), noise=noise,
            flipped=torch.zeros_like(able), difference=torch.full(able.shape, torch.inf, dtype=torch.float64, device=x.device),
        )  # fmt: skip
        for done in range(self.rounds):
            found = oracle.value_and_grad(at.point, at.y, margin, at.memory, at.index)
            check_labels(at.y, found.logits.shape[1])
            at.loss, at.wrong, at.gradient = found.loss.double(), found.logits.argmax(1) != at.y, finite(found.grad)
            self._report(at, progress, done, oracle.eot, found)
            if early_drop:
                at.keep(progress.open(at.index))
            self._reduce(oracle, at, progress, done)
            at.keep(~at.wrong)
            if len(at.index) == 0:
                return
            self._generate(oracle, at, progress, (done + 1) * self.first, at.noise.fork("round", done))
        loss, at.wrong = value(oracle, at.point, at.y, "margin", at.index)
        at.loss = loss.double()
        self._report(at, progress, self.rounds, 1)
        self._reduce(oracle, at, progress, self.rounds)

    def _report(
        self, at: Samples, progress: Progress, done: int, queries: int, found: Gradient | None = None
    ) -> None:  # fmt: skip
        """Report the points within the budget, except successes that are still to be reduced."""
        threat = require_flips(self)
        told = (threat.size(at.point, at.x) <= threat.limits(at.x)) & ~(at.wrong & at.flipped.any(1))
        progress.record(
            at.index, at.point, torch.where(told, at.loss, -torch.inf), at.wrong & told, done, queries, found
        )

    def _generate(
        self, oracle: Oracle, at: Samples, progress: Progress, count: int, noise: SampleGenerator
    ) -> None:  # fmt: skip
        """Flip those of the best candidates that do not raise the loss by themselves."""
        flat = at.x.double().flatten(1)
        now = torch.where(at.flipped, 1 - flat, flat)
        gradient = -at.gradient.double().flatten(
            1
        )  # of the loss, which is the negative margin while the sample is right
        gradient = torch.where((1 - 2 * now) * gradient <= 0, gradient, 0.0)
        least = torch.where(gradient != 0, gradient.abs(), torch.inf).amin(1, keepdim=True)
        least = torch.where(torch.isinf(least), 1.0, least)
        size = torch.where(gradient != 0, gradient.abs(), noise.uniform(flat) * least)
        size, cells = best_first(torch.where(at.able & ~at.flipped, size, -torch.inf), count)
        events = torch.where(now.gather(1, cells) > 0.5, cells + flat.shape[1], cells)
        tried, _ = try_events(oracle, at, events.unsqueeze(2), "margin")
        progress.queries[at.index] += events.shape[1]
        difference = (-tried.double()).clamp_min(0) - (-at.loss).clamp_min(0).unsqueeze(1)
        # Many flips change no spike: rounding must not tell which of them raise the loss.
        difference = torch.where(difference.abs() <= 1e-12, 0.0, difference)
        keep = (size > -torch.inf) & (difference <= 0)
        at.flipped = at.flipped.scatter(1, cells, at.flipped.gather(1, cells) | keep)
        at.difference = at.difference.scatter(1, cells, torch.where(keep, difference, at.difference.gather(1, cells)))
        at.point = torch.where(at.flipped.view_as(at.x), 1 - at.x, at.x)

    def _reduce(self, oracle: Oracle, at: Samples, progress: Progress, done: int) -> None:
        """Undo as many flips of the broken samples as a binary search finds, smallest difference first."""
        found = at.wrong & at.flipped.any(1)
        x, full = at.x[found], at.flipped[found]
        order = at.difference[found].abs().argsort(dim=1, stable=True)
        place = torch.arange(order.shape[1], device=order.device).expand_as(order)
        place = torch.zeros_like(order).scatter(1, order, place)
        best, loss = at.point[found].clone(), at.loss[found].clone()
        slot = torch.arange(len(x), device=x.device)
        left = Samples(slot=slot, y=at.y[found], low=torch.zeros_like(slot), high=full.sum(1) - 1)
        while len(left.slot):
            middle = (left.low + left.high) // 2
            flipped = full[left.slot] & (place[left.slot] > middle.unsqueeze(1))
            clean = x[left.slot]
            point = torch.where(flipped.view_as(clean), 1 - clean, clean)
            rows = at.index[found][left.slot]
            value_, wrong = value(oracle, point, left.y, "margin", rows)
            progress.queries[rows] += 1
            best[left.slot[wrong]], loss[left.slot[wrong]] = point[wrong], value_[wrong].double()
            left.low, left.high = torch.where(wrong, middle + 1, left.low), torch.where(wrong, left.high, middle - 1)
            left.keep(left.low <= left.high)
        threat = require_flips(self)
        told = threat.size(best, x) <= threat.limits(x)
        progress.record(at.index[found], best, torch.where(told, loss, -torch.inf), told, done, 0)
