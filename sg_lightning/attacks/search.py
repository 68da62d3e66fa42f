"""What the loops of iterative attacks share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sg_lightning.attacks.answers import check_labels
from sg_lightning.attacks.losses import get_loss
from sg_lightning.attacks.oracle import Oracle
from sg_lightning.inputs import Input, apply, select

if TYPE_CHECKING:
    from sg_lightning.attacks.base import Progress


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
        if not bool(mask.all()):
            self.take(mask)

    def take(self, index: Tensor) -> None:
        """Keep the samples ``index`` (int64 or bool mask)."""
        for name, part in self.__dict__.items():
            if isinstance(part, Tensor | dict):
                self.__dict__[name] = select(part, index)
            elif not isinstance(part, int | float):
                self.__dict__[name] = part.select(index)


def value(oracle: Oracle, point: Input, y: Tensor, loss: str, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return loss and misclassification (B,) by one forward pass on the samples ``rows`` of the batch (``None``: all)."""
    logits = oracle.logits(point, rows)
    check_labels(y, logits.shape[1])
    return get_loss(loss)(logits, y), logits.argmax(1) != y


def look_at(oracle: Oracle, at: Samples, progress: Progress, loss: str) -> None:
    """Evaluate an untargeted loss and its gradient at ``at.point``, and report it as iteration ``at.step``."""
    found = oracle.value_and_grad(at.point, at.y, get_loss(loss), at.memory, at.rows)
    progress.record(at.index, at.point, found.loss, found.logits.argmax(1) != at.y, at.step, oracle.passes, found)
    at.gradient = finite(found.grad)


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
