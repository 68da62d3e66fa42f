"""Attacks that add and delete single events: greedy by true differences, swaps, one pattern for all samples."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import torch
from torch import Tensor

from sg_lightning.attacks.answers import check_labels
from sg_lightning.attacks.base import Attack, Progress
from sg_lightning.attacks.estimators import Memory
from sg_lightning.attacks.gradient import PGD
from sg_lightning.attacks.losses import get_loss, higher
from sg_lightning.attacks.oracle import Oracle
from sg_lightning.attacks.search import Samples, finite, normalised, value, whole_number
from sg_lightning.inputs import select
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import EventFlips
from sg_lightning.threats.geometry import top_k

POINTS_PER_CALL = 256  # candidates that go through the model at once, at least one of every sample


def require_flips(attack: Attack) -> EventFlips:
    """Return the threat of an attack on single events.

    Raises:
        TypeError: if it is another kind of threat.
    """
    if not isinstance(attack.threat, EventFlips):
        raise TypeError(
            f"{type(attack).__name__} adds and deletes single events, got {attack.threat!r}; use EventFlips"
        )
    return attack.threat


def require_binary(threat: EventFlips, what: str) -> None:
    """Raise ``ValueError`` unless the threat is about binary rasters."""
    if threat.domain.lattice != "binary":
        raise ValueError(f"{what} is defined on binary rasters, but the domain is {threat.domain}; use GreedyFlips")


def with_events(point: Tensor, events: Tensor) -> Tensor:
    """Apply single events to copies of each sample.

    Args:
        point: Inputs (B, ...) of n values.
        events: int64 (B, C, M): M events for each of C copies; event i < n adds one at value i, event n + i deletes
            one, event 2 n does nothing.

    Returns:
        (B, C, ...).
    """
    flat = point.flatten(1)
    values = flat.shape[1]
    copies = flat.unsqueeze(1).expand(-1, events.shape[1], -1).clone()
    change = torch.where(events < values, 1.0, torch.where(events < 2 * values, -1.0, 0.0)).to(point.dtype)
    copies.scatter_add_(2, events % values, change)
    return copies.view(*events.shape[:2], *point.shape[1:])


def try_events(oracle: Oracle, at: Samples, events: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """Return loss and misclassification (B, C) with each of the ``events`` (B, C, M) on top of ``at.point``."""
    losses, wrongs = [], []
    for part in events.split(max(1, POINTS_PER_CALL // len(events)), dim=1):
        points = with_events(at.point, part)
        y, rows = (t.repeat_interleave(part.shape[1]) for t in (at.y, at.index))
        found, wrong = value(oracle, points.flatten(0, 1), y, loss, rows)
        losses.append(found.view(part.shape[:2]))
        wrongs.append(wrong.view(part.shape[:2]))
    return torch.cat(losses, dim=1), torch.cat(wrongs, dim=1)


def best_first(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` highest scores and their places, (B, count); of equal ones the lower place first."""
    found = score.sort(dim=1, descending=True, stable=True)
    return found.values[:, :count], found.indices[:, :count]


def first_order(grad: Tensor, allowed: Tensor) -> Tensor:
    """Return what each allowed event gains to first order, (B, 2 n); ``-inf`` for the others."""
    slope = grad.double().flatten(1)
    return torch.where(allowed, torch.cat([slope, -slope], dim=1), -torch.inf)


def _worth(promise: Tensor, loss: Tensor, wrong: Tensor) -> Tensor:
    """Rank evaluated candidates (B, C): a misclassified one before all others, a forbidden one after them.

    In float32, so that rounding in the last bits of a float64 model does not tell equal ones apart.
    """
    return torch.where(promise > -torch.inf, torch.where(wrong, torch.inf, loss.float()), -torch.inf)


@dataclass(frozen=True)
class GreedyFlips(Attack):
    """Make the events that raise the loss most, one after the other, each chosen by evaluating it.

    The candidates of a round are those that promise most by the gradient; the network itself then decides, so a
    gradient that is wrong in size or order does little harm. A sample is given up where every candidate lowers the
    loss. On a loss that is a sum over cells it finds the optimum.

    Args:
        threat: An ``EventFlips`` threat.
        candidates: Events evaluated per round, >= 1; ``None``: all, without regard to the gradient.
        per_round: Events made per round, the best of the candidates, >= 1; more is faster and less exact.
        loss: ``"margin"`` or ``"ce"``.

    Raises:
        TypeError: under another threat.
        ValueError: on settings out of range.
    """

    candidates: int | None = 64
    per_round: int = 1
    loss: str = "margin"
    kind: ClassVar[str] = "greedy"
    abreast: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_flips(self)
        get_loss(self.loss)
        whole_number("per_round", self.per_round, 1)
        if self.candidates is not None:
            whole_number("candidates", self.candidates, 1)

    @property
    def title(self) -> str:
        """``greedy-<candidates>``, with ``x<per_round>`` if that is not 1."""
        several = f"x{self.per_round}" if self.per_round > 1 else ""
        return f"greedy-{self.candidates or 'all'}{several}"

    def _search(  # type: ignore[override]
        self, oracle: Oracle, x: Tensor, y: Tensor, noise: SampleGenerator, progress: Progress, early_drop: bool
    ) -> None:
        threat = require_flips(self)
        limit = threat.limits(x).long()
        at = Samples(index=torch.arange(len(y), device=y.device), x=x, y=y, point=x, left=limit, memory=Memory())
        for done in count():
            found = oracle.value_and_grad(at.point, at.y, get_loss(self.loss), at.memory, at.index)
            check_labels(at.y, found.logits.shape[1])
            progress.record(at.index, at.point, found.loss, found.logits.argmax(1) != at.y, done, oracle.eot, found)
            at.loss, at.gradient = found.loss, finite(found.grad)
            at.keep((at.left > 0) & progress.open(at.index) if early_drop else at.left > 0)
            if len(at.index) == 0:
                return
            promise = first_order(at.gradient, threat.growing(at.point, at.x))
            promise, events = best_first(promise, self.candidates or promise.shape[1])
            tried, wrong = try_events(oracle, at, events.unsqueeze(2), self.loss)
            progress.queries[at.index] += events.shape[1]
            gain, place = best_first(_worth(promise, tried, wrong), self.per_round)
            useful = ~higher(at.loss.float().unsqueeze(1), gain)
            useful &= torch.arange(gain.shape[1], device=gain.device) < at.left.unsqueeze(1)
            chosen = torch.where(useful, events.gather(1, place), 2 * at.x[0].numel())
            at.point = with_events(at.point, chosen.unsqueeze(1)).squeeze(1)
            at.left = torch.where(useful.any(1), at.left - useful.sum(1), 0)


@dataclass(frozen=True)
class SwapFlips(PGD):
    """Run PGD on single events, then swap events as long as a swap raises the loss.

    PGD keeps a running average of gradients as a score of every event and jumps to the best set within the budget.
    From the best set it found, each swap undoes one event and makes another (or only makes one, if budget is left):
    the pairs that promise most by the gradient are evaluated and the best is kept if it raises the loss.

    Args:
        threat: An ``EventFlips`` threat.
        steps: Gradient steps of PGD per restart, >= 1.
        restarts: Independent random starts of PGD, >= 1.
        random_start: Start PGD at a random allowed point.
        loss: ``"margin"`` or ``"ce"``.
        momentum: Weight of the previous gradients, 0 <= momentum < 1; ``None``: 0.75.
        swaps: Largest number of swaps, >= 1.
        width: Events considered for undoing, and as many for making, >= 1.
        candidates: Pairs of them evaluated per swap, >= 1.

    Raises:
        TypeError: under another threat.
        ValueError: on settings out of range.
    """

    random_start: bool = False
    loss: str = "margin"
    swaps: int = 20
    width: int = 16
    candidates: int = 64
    kind: ClassVar[str] = "swap"
    abreast: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_flips(self)
        for name in ("swaps", "width", "candidates"):
            whole_number(name, getattr(self, name), 1)

    @property
    def title(self) -> str:
        """``swap-<steps>-<swaps>``, with ``x<restarts>`` if there are several."""
        return f"swap-{self.steps}-{self.swaps}" + (f"x{self.restarts}" if self.restarts > 1 else "")

    def _search(  # type: ignore[override]
        self, oracle: Oracle, x: Tensor, y: Tensor, noise: SampleGenerator, progress: Progress, early_drop: bool
    ) -> None:
        super()._search(oracle, x, y, noise, progress, early_drop)
        everyone = torch.arange(len(y), device=y.device)
        index = everyone[progress.open(everyone)] if early_drop else everyone
        if len(index):
            self._swap(oracle, x, y, index, progress, early_drop)

    def _swap(
        self, oracle: Oracle, x: Tensor, y: Tensor, index: Tensor, progress: Progress, early_drop: bool
    ) -> None:  # fmt: skip
        threat = require_flips(self)
        point = select(progress.x_adv, index)
        at = Samples(index=index, x=x[index], y=y[index], point=point, memory=Memory())
        done = self.restarts * self.steps
        for swap in range(self.swaps):
            found = oracle.value_and_grad(at.point, at.y, get_loss(self.loss), at.memory, at.index)
            progress.record(
                at.index, at.point, found.loss, found.logits.argmax(1) != at.y, done + swap, oracle.eot, found
            )
            at.loss, at.gradient = found.loss, finite(found.grad)
            if early_drop:
                at.keep(progress.open(at.index))
            if len(at.index) == 0:
                return
            pairs, promise = self._pairs(threat, at)
            tried, wrong = try_events(oracle, at, pairs, self.loss)
            progress.queries[at.index] += pairs.shape[1]
            gain, place = best_first(_worth(promise, tried, wrong), 1)
            better = higher(gain, at.loss.float().unsqueeze(1)).squeeze(1)
            chosen = pairs.gather(1, place.unsqueeze(2).expand(-1, -1, 2))
            at.point = torch.where(
                better.view(-1, *[1] * (at.x.dim() - 1)), with_events(at.point, chosen).squeeze(1), at.point
            )
            at.keep(better)
            if len(at.index) == 0:
                return
        loss, wrong = value(oracle, at.point, at.y, self.loss, at.index)
        progress.record(at.index, at.point, loss, wrong, done + self.swaps, 1)

    def _pairs(self, threat: EventFlips, at: Samples) -> tuple[Tensor, Tensor]:
        """Return the most promising pairs of an event undone and one made, (B, C, 2), and what they promise (B, C)."""
        change = (at.point.double() - at.x.double()).flatten(1)
        made = torch.cat([change < 0, change > 0], dim=1)  # undoing a deletion adds, undoing an addition deletes
        spare = threat.size(at.point, at.x) < threat.limits(at.x)
        nothing = torch.where(spare, 0.0, -torch.inf).unsqueeze(1)
        back, undone = best_first(torch.cat([first_order(at.gradient, made), nothing], dim=1), self.width)
        forth, new = best_first(first_order(at.gradient, threat.growing(at.point, at.x)), self.width)
        promise, place = best_first((back.unsqueeze(2) + forth.unsqueeze(1)).flatten(1), self.candidates)
        pairs = [undone.gather(1, place // forth.shape[1]), new.gather(1, place % forth.shape[1])]
        return torch.stack(pairs, dim=2), promise


@dataclass(frozen=True)
class UniversalFlips(Attack):
    """Search one pattern of flips that fools as many samples as possible when applied to all of them.

    The pattern is the set of the cells with the highest score, a running average over steps of the gradient's gain
    averaged over the samples that are still right. Of all patterns tried, the one that fools most counts; of equal
    ones the one with the highest mean loss. A sample with a smaller budget gets the first cells of the pattern.

    Unlike those of all other attacks its results depend on which samples are attacked together: a sample's example
    changes with the batch, its order of summation and the samples that earlier attacks of a suite have broken.

    Args:
        threat: An ``EventFlips`` threat on ``Binary()``.
        steps: Patterns tried, >= 1.
        loss: ``"margin"`` or ``"ce"``.
        momentum: Weight of the previous scores, 0 <= momentum < 1.

    Raises:
        TypeError: under another threat.
        ValueError: on settings out of range, or a domain that is not binary.

    Source:
        Universal perturbations: Moosavi-Dezfooli et al., arXiv 1610.08401; found here by ascent on a shared score.
    """

    steps: int = 20
    loss: str = "margin"
    momentum: float = 0.75
    kind: ClassVar[str] = "universal"

    def __post_init__(self) -> None:
        super().__post_init__()
        get_loss(self.loss)
        whole_number("steps", self.steps, 1)
        require_binary(require_flips(self), "a universal pattern of flips")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")

    @property
    def title(self) -> str:
        """``universal-<steps>``."""
        return f"universal-{self.steps}"

    def _search(  # type: ignore[override]
        self, oracle: Oracle, x: Tensor, y: Tensor, noise: SampleGenerator, progress: Progress, early_drop: bool
    ) -> None:
        threat = require_flips(self)
        everyone = torch.arange(len(y), device=y.device)
        unseen = torch.full((len(y),), -torch.inf, dtype=torch.float64, device=y.device)
        allowed = threat.growing(x, x).view(len(y), 2, -1).any(1)
        limit = threat.limits(x).unsqueeze(1)
        memory = Memory()
        point, best, record = x, x, (-1.0, -torch.inf)
        score = torch.zeros_like(allowed[:1], dtype=torch.float64)
        for step in range(self.steps + 1):
            found = oracle.value_and_grad(point, y, get_loss(self.loss), memory)
            check_labels(y, found.logits.shape[1])
            wrong = found.logits.argmax(1) != y
            # Only the best pattern may be kept, so the others are told as if they had no loss.
            progress.record(everyone, point, unseen, torch.zeros_like(wrong), step, oracle.eot, found)
            reached = (float(wrong.sum()), float(found.loss.double().mean()))
            best, record = (point, reached) if reached > record else (best, record)
            if bool(wrong.all()):
                break
            gain = normalised(finite(found.grad).double()).flatten(1) * (1 - 2 * x.double().flatten(1))  # type: ignore[union-attr]
            score = self.momentum * score + torch.where(allowed, gain, 0.0)[~wrong].mean(0, keepdim=True)
            flips = top_k(score.expand_as(gain), limit).bool() & allowed
            point = torch.where(flips.view_as(x), 1 - x, x)
        loss, wrong = value(oracle, best, y, self.loss)
        progress.record(everyone, best, loss, wrong, self.steps, 1)
