"""Several runs of an attack, restarts and targets: as one batch where few samples are left."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sg_lightning.attacks.answers import check_labels
from sg_lightning.attacks.base import Goal, Progress
from sg_lightning.attacks.losses import get_loss
from sg_lightning.attacks.oracle import Oracle
from sg_lightning.attacks.room import cheap
from sg_lightning.attacks.search import Samples
from sg_lightning.inputs import Input, batch_size, select
from sg_lightning.sampling import SampleGenerator


class Together(Progress):
    """The progress of several runs on the same samples.

    Args:
        x: Inputs: for run 0 of all samples, for run 1 of all samples, ...
        goal: As of :class:`~sg_lightning.attacks.base.Progress`.
        count: Number of runs.
    """

    def __init__(self, x: Input, goal: Goal, count: int) -> None:
        super().__init__(x, goal)
        self.count = count

    def open(self, index: Tensor) -> Tensor:
        """Tell which rows are neither broken nor invalid, nor made needless by an earlier run of their sample."""
        closed = (self.success | self.invalid).view(self.count, -1).long()
        return (closed.cumsum(0) == 0).view(-1)[index]


def runs(
    oracle: Oracle, x: Input, y: Tensor, noise: SampleGenerator, progress: Progress, early_drop: bool, *, loss: str,
    steps: int, restarts: int, targets: int = 0, judge_clean: bool = True,
) -> Iterator[tuple[Samples, Progress]]:  # fmt: skip
    """Give an attack its samples, run after run: all restarts, for each target; and what it reports their progress to.

    What comes of it is as if the runs went one after the other, each on the samples that the ones before have left. But
    with ``early_drop``, where few samples are left, several runs go on at once, and the later ones of a sample stop as soon
    as an earlier one has broken it.

    The samples have their place ``index`` in that progress and ``rows`` in the batch, ``x``, labels ``y``, what the loss
    takes (``goal``: the labels, or labels and targets (B, 2), the wrong classes in the order of their clean logits),
    ``noise`` of their own, the number ``run`` (B,) of their run, and ``point``, the clean input. With ``early_drop`` only
    those that are still open.

    Args:
        oracle: The model.
        x: Clean inputs.
        y: Labels (B,).
        noise: Randomness of the samples.
        progress: Told of the clean inputs, so that no run is spent on what is already misclassified, and of all runs.
        early_drop: Whether broken samples are left out.
        loss: Name of the untargeted loss.
        steps: Iterations per run.
        restarts: Runs per target.
        targets: Number of target classes; 0: untargeted.
        judge_clean: Whether to look at the clean inputs; targets need it.
    """
    everyone = torch.arange(len(y), device=y.device)
    ranked = y.unsqueeze(1)
    if judge_clean or targets:
        logits = oracle.logits(x)
        check_labels(y, logits.shape[1])
        progress.record(everyone, x, get_loss(loss)(logits, y), logits.argmax(1) != y, 0, 1)
        ranked = logits.scatter(1, y.unsqueeze(1), -torch.inf).argsort(stable=True, dim=1, descending=True)[:, :-1]
    total, done = restarts * max(1, min(targets, ranked.shape[1])), 0
    while done < total:
        index = everyone[progress.open(everyone)] if early_drop else everyone
        if len(index) == 0:
            return
        fit = cheap(y.device) // len(index) if early_drop else 1
        numbers = torch.arange(done, min(done + max(fit, 1), total), device=y.device)
        rows, run = index.repeat(len(numbers)), numbers.repeat_interleave(len(index))
        goal = torch.stack([y[rows], ranked[rows, run // restarts]], 1) if targets else y[rows]
        part = select(x, rows)
        # One run, the usual case, reports to the whole by itself.
        own = progress if total == 1 else Together(part, progress.goal, len(numbers))
        keys = [noise.fork("restart", number).select(index).keys for number in numbers.tolist()]
        yield Samples(
            index=rows if own is progress else torch.arange(len(rows), device=y.device),
            rows=rows, run=run, x=part, point=part, y=y[rows], goal=goal, noise=SampleGenerator(torch.cat(keys)),
        ), own  # fmt: skip
        if own is not progress:
            for number, places in zip(numbers.tolist(), torch.arange(batch_size(part)).split(len(index)), strict=True):
                progress.absorb(index, own, places.to(y.device), number * steps)
        done += len(numbers)
