"""What the loops of iterative attacks share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sg_lightning.attacks.losses import get_loss
from sg_lightning.attacks.oracle import Oracle, check_labels
from sg_lightning.inputs import Input, apply, select


class Samples:
    """The samples that an attack still works on: attributes with one entry per sample, cut together.

    An attribute may be a tensor (B, ...), a dict of them, or anything with ``select(index)``. All that belongs to a
    sample lives here, so that none is forgotten when samples drop out.
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
            self.__dict__[name] = select(part, mask) if isinstance(part, Tensor | dict) else part.select(mask)


def value(oracle: Oracle, point: Input, y: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """Return loss and misclassification (B,) by one forward pass."""
    logits = oracle.logits(point)
    check_labels(y, logits.shape[1])
    return get_loss(loss)(logits, y), logits.argmax(1) != y


def finite(grad: Input) -> Input:
    """Replace what is not finite by zero; the oracle has marked those samples."""
    return apply(lambda g: torch.nan_to_num(g, 0.0, 0.0, 0.0), grad)


def normalised(grad: Tensor) -> Tensor:
    """Divide by the mean absolute value per sample, safely for gradients of any scale."""
    top = grad.abs().flatten(1).amax(1).view(-1, *[1] * (grad.dim() - 1))
    scaled = grad / top.clamp_min(torch.finfo(grad.dtype).tiny)
    mean = scaled.abs().flatten(1).mean(1).view_as(top)
    return scaled / mean.clamp_min(torch.finfo(grad.dtype).tiny)
