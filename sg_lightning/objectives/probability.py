"""The probability of the true class, the output whose input gradient the penalties and metrics measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Output = Literal["margin", "softmax"]


def check_logits(logits: Tensor, owner: str = "forward(x)") -> None:
    """Raise an error that says what is wrong unless ``logits`` are floats of shape (B, K) with K >= 2.

    Raises:
        TypeError: if they are no tensor.
        ValueError: on another shape or an integer dtype.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{owner} must return logits, a tensor (B, K), but returned {type(logits).__name__}; return the logits alone"
        )
    if logits.dim() != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ValueError(
            f"{owner} must return float logits of shape (B, K) with K >= 2 classes, got {logits.dtype} of shape "
            f"{tuple(logits.shape)}"
        )


def check_indices(y: Tensor) -> None:
    """Raise ``ValueError`` unless ``y`` are class indices, int64 (B,)."""
    if not isinstance(y, Tensor) or y.dim() != 1 or y.dtype != torch.int64:
        what = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"labels must be class indices, int64 of shape (B,), got {what}")


def check_labels(y: Tensor, logits: Tensor) -> None:
    """Raise ``ValueError`` unless ``y`` are class indices int64 (B,), as many as ``logits`` (B, K) and at least one."""
    check_indices(y)
    if y.shape[0] != logits.shape[0]:
        raise ValueError(f"got {y.shape[0]} labels for logits of {logits.shape[0]} samples")
    if y.shape[0] == 0:
        raise ValueError("the batch is empty; drop empty batches")


def check_label_range(y: Tensor, num_classes: int) -> None:
    """Raise ``ValueError`` if a label is outside 0 .. K-1. Reads values, so it waits for an accelerator."""
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels must be in 0..{num_classes - 1} for {num_classes} classes, got {low}..{high}; "
            "relabel the data or build the model with the right num_classes"
        )


def probability_at(logits: Tensor, y: Tensor, output: Output = "margin") -> Callable[[Tensor], Tensor]:
    """Make the function logits (B, K) -> probability of the true class (B,), frozen at ``logits``.

    Args:
        logits: Logits (B, K) of the clean point. For ``"margin"`` they choose the competitor of each sample once.
        y: True classes (B,).
        output: ``"margin"`` for sigmoid(z_y - z_j), j the best wrong class at ``logits``: a softmax over two
            classes. ``"softmax"`` for the softmax over all.

    Returns:
        A differentiable function; half precision is widened to float32 first.

    Source:
        Two classes: the official code of arXiv 2405.20355, here without its exponentials, which overflow.
    """
    if output not in get_args(Output):
        raise ValueError(f"unknown output {output!r}; choose one of {', '.join(get_args(Output))}")
    check_logits(logits)
    check_labels(y, logits)
    if not y.is_cuda:  # there the check would wait for the device at every step
        check_label_range(y, logits.shape[1])
    true = y.unsqueeze(1)
    if output == "softmax":
        return lambda z: _wide(z).softmax(1).gather(1, true).squeeze(1)
    rival = logits.detach().scatter(1, true, -torch.inf).argmax(1, keepdim=True)

    def two_class(z: Tensor) -> Tensor:
        z = _wide(z)
        return torch.sigmoid((z.gather(1, true) - z.gather(1, rival)).squeeze(1))

    return two_class


def _wide(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()
