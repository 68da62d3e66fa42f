"""Per-sample losses that attacks maximise.

Untargeted: (logits (B, K), labels (B,)) -> (B,). Targeted: the labels are (B, 2), the true class and the one to reach.
"""

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
    return _best_wrong(logits, y) - _of(logits, y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio: the margin, divided by the distance of the first and the third logit.

    It does not change when logits are shifted or scaled. It needs three classes: with two it is the margin.

    Source:
        Croce and Hein, arXiv 2003.01690, equation 6.
    """
    if logits.shape[1] < 3:
        return margin(logits, y)
    first, _, third = logits.topk(3, dim=1).values.unbind(1)
    return margin(logits, y) / (first - third + 1e-12)


def cross_entropy_targeted(logits: Tensor, y: Tensor) -> Tensor:
    """Minus the cross-entropy of the target class, in float64."""
    return -cross_entropy(logits, y[:, 1])


def margin_targeted(logits: Tensor, y: Tensor) -> Tensor:
    """Target logit minus the true one.

    Source:
        Gowal et al., "An alternative surrogate loss for PGD-based adversarial testing", arXiv 1910.09338.
    """
    return _of(logits, y[:, 1]) - _of(logits, y[:, 0])


def dlr_targeted(logits: Tensor, y: Tensor) -> Tensor:
    """Targeted difference of logits ratio; with fewer than four classes it is the targeted margin.

    Source:
        Croce and Hein, arXiv 2003.01690, equation 7.
    """
    if logits.shape[1] < 4:
        return margin_targeted(logits, y)
    first, _, third, fourth = logits.topk(4, dim=1).values.unbind(1)
    return margin_targeted(logits, y) / (first - (third + fourth) / 2 + 1e-12)


def higher(loss: Tensor, than: Tensor) -> Tensor:
    """Tell where a loss is higher by more than rounding, bool.

    Many changes of an input change no spike, so equal losses are common. Matrix kernels round by batch shape: if their
    last bits decided, the path of a sample would depend on the others in its batch.
    """
    than = than.double()
    return loss.double() > than + 1e-14 + 1e-12 * than.abs().clamp_max(1e300)  # clamped: -inf + inf is no number


def _of(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y.unsqueeze(1)).squeeze(1)


def _best_wrong(logits: Tensor, y: Tensor) -> Tensor:
    return logits.masked_fill(functional.one_hot(y, logits.shape[1]).bool(), -torch.inf).amax(1)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}
TARGETED: dict[str, Loss] = {"ce": cross_entropy_targeted, "margin": margin_targeted, "dlr": dlr_targeted}


def get_loss(name: str, *, targeted: bool = False) -> Loss:
    """Look a loss up by name.

    Raises:
        ValueError: on an unknown name, with the known ones.
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; known losses: {', '.join(LOSSES)}")
    return (TARGETED if targeted else LOSSES)[name]
