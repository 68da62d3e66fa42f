"""What the loops of iterative attacks share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sg_lightning.attacks.base import Progress
from sg_lightning.attacks.losses import get_loss
from sg_lightning.attacks.oracle import Oracle, check_labels
from sg_lightning.inputs import Input, apply, select
from sg_lightning.sampling import SampleGenerator


class Samples:
    """The samples that an attack still works on: attributes with one entry per sample, cut together.

    An attribute may be a tensor (B, ...), a dict of them, anything with ``select(index)``, or a number that is the same
    for all. Everything that belongs to a sample lives here, so that nothing is forgotten when samples drop out.
    """

    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...

    def keep(self, mask: Tensor) -> None:
        """Keep the samples where ``mask`` (B,) is true."""
        if bool(mask.all()):
            return
        for name, part in self.__dict__.items():
            if isinstance(part, Tensor | dict):
                self.__dict__[name] = select(part, mask)
            elif not isinstance(part, int | float):
                self.__dict__[name] = part.select(mask)


def runs(
    oracle: Oracle, x: Input, y: Tensor, noise: SampleGenerator, progress: Progress, early_drop: bool, *, loss: str,
    restarts: int, targets: int = 0, judge_clean: bool = True,
) -> Iterator[Samples]:  # fmt: skip
    """Give an attack its samples, run after run: all restarts, for each target.

    The samples have ``index``, ``x``, labels ``y``, what the loss takes (``goal``: the labels, or labels and targets
    (B, 2), the wrong classes in the order of their clean logits), ``noise`` of their own, the ``number`` of the run,
    and ``point``, the clean input. With ``early_drop`` only those that are still open.

    Args:
        oracle: The model.
        x: Clean inputs.
        y: Labels (B,).
        noise: Randomness of the samples.
        progress: Told of the clean inputs, so that no run is spent on what is already misclassified.
        early_drop: Whether broken samples are left out.
        loss: Name of the untargeted loss.
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
    for number in range(restarts * max(1, min(targets, ranked.shape[1]))):
        index = everyone[progress.open(everyone)] if early_drop else everyone
        if len(index) == 0:
            return
        goal = torch.stack([y, ranked[:, number // restarts]], 1) if targets else y
        part = select(x, index)
        yield Samples(
            index=index, x=part, point=part, y=y[index], goal=goal[index],
            noise=noise.fork("restart", number).select(index), number=number,
        )  # fmt: skip


def value(oracle: Oracle, point: Input, y: Tensor, loss: str, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return loss and misclassification (B,) by one forward pass on the samples ``rows`` of the batch (``None``: all)."""
    logits = oracle.logits(point, rows)
    check_labels(y, logits.shape[1])
    return get_loss(loss)(logits, y), logits.argmax(1) != y


def finite(grad: Input) -> Input:
    """Replace what is not finite by zero; the oracle has marked those samples."""
    return apply(lambda g: torch.nan_to_num(g, 0.0, 0.0, 0.0), grad)


def normalised(grad: Tensor) -> Tensor:
    """Divide by the mean absolute value per sample, safely for gradients of any scale."""
    top = column(grad.abs().flatten(1).amax(1), grad)
    scaled = grad / top.clamp_min(torch.finfo(grad.dtype).tiny)
    mean = scaled.abs().flatten(1).mean(1).view_as(top)
    return scaled / mean.clamp_min(torch.finfo(grad.dtype).tiny)


def unit(grad: Tensor) -> Tensor:
    """Flatten to float64 (B, n) and divide by the Euclidean length per sample, safely for gradients of any scale."""
    flat = normalised(grad.double()).flatten(1)
    return flat / flat.norm(dim=1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)


def column(values: Tensor, like: Tensor) -> Tensor:
    """Give per-sample values (B,) the shape (B, 1, ...) that goes with inputs ``like``."""
    return values.view(-1, *[1] * (like.dim() - 1))


def whole_number(name: str, value: object, least: int) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
