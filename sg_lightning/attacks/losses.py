"""Per-sample losses that attacks maximise: (logits (B, K), labels (B,)) -> (B,)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy in float64: in float32 it saturates at margins above ~17 and its gradient vanishes.

    In a float32 model the gradient still underflows above ~90: use ``margin`` for logits that large.
    """
    return functional.cross_entropy(logits.double(), y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Best wrong logit minus the true one; positive when misclassified. Never saturates."""
    true = logits.gather(1, y.unsqueeze(1)).squeeze(1)
    wrong = logits.masked_fill(functional.one_hot(y, logits.shape[1]).bool(), -torch.inf).amax(1)
    return wrong - true


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin}


def get_loss(name: str) -> Loss:
    """Look a loss up by name.

    Raises:
        ValueError: on an unknown name, with the known ones.
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; known losses: {', '.join(LOSSES)}")
    return LOSSES[name]
