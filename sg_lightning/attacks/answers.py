"""What a model answers to an attack: the answers, how many, and whether they are what attacks need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sg_lightning.inputs import Input


@dataclass
class Counts:
    """Samples sent through the model so far."""

    forwards: int = 0
    backwards: int = 0


class Health:
    """State of the gradients seen so far, in samples. Counted where the gradients are, read when asked for."""

    def __init__(self) -> None:
        self.total = 0
        self._counts: Tensor | None = None  # zero, nonfinite

    def note(self, zero: Tensor, nonfinite: Tensor) -> None:
        """Add what is said of some samples, bool (B,) each."""
        self.total += len(zero)
        if self._counts is None:
            self._counts = torch.zeros(2, dtype=torch.int64, device=zero.device)
        self._counts = self._counts.to(zero.device)  # the model may have moved
        self._counts += torch.stack([zero.sum(), nonfinite.sum()])

    @property
    def zero(self) -> int:
        """Gradients that were exactly zero."""
        return 0 if self._counts is None else int(self._counts[0])

    @property
    def nonfinite(self) -> int:
        """Gradients with NaN or infinite entries."""
        return 0 if self._counts is None else int(self._counts[1])

    @property
    def share_zero(self) -> float:
        """Share of gradients that were exactly zero."""
        return self.zero / self.total if self.total else 0.0

    @property
    def share_nonfinite(self) -> float:
        """Share of gradients with NaN or infinite entries."""
        return self.nonfinite / self.total if self.total else 0.0


@dataclass(frozen=True)
class Gradient:
    """One evaluation: loss (B,), logits (B, K), input gradient, and whose was non-finite or zero everywhere (B,)."""

    loss: Tensor
    logits: Tensor
    grad: Input
    invalid: Tensor
    zero: Tensor


def all_finite_all_zero(grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Tell per sample whether all of ``grads``, (B, ...) each, are finite, and whether they are zero everywhere; bool (B,).

    Asked of the extremes, one of which is NaN if there is one: many times cheaper than a look at every value.
    """
    found = [end for g in grads if g.numel() for end in _extremes(g)]
    ends = torch.stack(found or [torch.zeros(len(grads[0]), device=grads[0].device)])
    return torch.isfinite(ends).all(0), (ends == 0).all(0)


def _extremes(g: Tensor) -> tuple[Tensor, Tensor]:
    axes = tuple(range(1, g.dim()))
    return (g.amin(axes), g.amax(axes)) if axes else (g, g)


def check_graph(value: Tensor) -> None:
    """Raise ``ValueError`` with the cure unless gradients can flow back from ``value``."""
    if not value.requires_grad:
        raise ValueError(
            "the model's output does not depend on its input through differentiable operations: it detaches, rounds or "
            "runs under no_grad; white-box attacks need a gradient"
        )


def check_logits(z: Any, samples: int) -> None:
    """Raise with the cure unless ``z`` looks like logits (B, K)."""
    if not isinstance(z, Tensor):
        raise TypeError(
            f"the model returned a {type(z).__name__}, but attacks need one tensor of logits (B, K): wrap it in a module "
            "whose forward returns logits only (from_snntorch(...) does that for snnTorch networks)"
        )
    if z.dim() != 2 or z.shape[0] != samples or not z.is_floating_point():
        raise ValueError(
            f"the model returned {z.dtype} of shape {tuple(z.shape)} for {samples} samples; expected float logits "
            f"({samples}, K) with K >= 2 classes"
        )
    if z.shape[1] < 2:
        raise ValueError("the model returned one output per sample; attacks need logits of at least 2 classes")
    values = z.detach().float()
    if bool(((values >= 0) & (values <= 1)).all()) and bool(((values.sum(1) - 1).abs() < 1e-4).all()):
        raise ValueError(
            "the model returned probabilities (rows in [0, 1] that sum to 1), but attacks need logits: a softmax hides "
            "gradients and overstates robustness. Remove the final softmax"
        )


def check_labels(y: Tensor, classes: int) -> None:
    """Raise ``ValueError`` if a label is no class of the model."""
    if int(y.max()) >= classes:
        raise ValueError(
            f"label {int(y.max())} is no class of the model, whose logits have {classes} classes (0 to {classes - 1})"
        )
