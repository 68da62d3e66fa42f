"""The only thing that a foreign library sees of a model: a module without weights, over inputs in [0, 1]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sg_lightning.attacks.oracle import Oracle
from sg_lightning.domains import Domain


class Shell(nn.Module):
    """Answer a library's questions through an oracle.

    The library gets logits and input gradients and nothing else: no weight to collect a gradient, no sub-module whose
    flags it could change, no batch statistics.

    Args:
        oracle: The model behind its oracle.
        domain: Legal values of the model's inputs, with two finite walls; the library's are [0, 1].
        x: Clean inputs (B, ...) that are attacked; the library's have four axes.
        rows: Which samples of the batch these are, int64 (B,); ``None``: all, in order.

    Attributes:
        unit: What to hand to the library, contiguous float32 (B, C, H, W) in [0, 1].
        forwards: Rows that the library sent through the model.
        gradients: Gradients taken of each sample, int64 (B,).
        zero: How many of them were zero everywhere, int64 (B,).
        invalid: Whether one of them was not finite, bool (B,). These three know the sample only while the library sends
            the whole batch; the oracle's own counts hold all.
    """

    def __init__(self, oracle: Oracle, domain: Domain, x: Tensor, rows: Tensor | None = None) -> None:
        super().__init__()
        self.oracle, self.domain, self.clean, self.rows = oracle, domain, x, rows
        # Libraries ask the first parameter for the device.
        self.anchor = nn.Parameter(torch.zeros((), device=x.device), requires_grad=False)
        self.unit = self._as_images(((x - domain.low) / domain.width).clamp(0.0, 1.0).float()).contiguous()
        self.forwards = 0
        self.gradients = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.zero = torch.zeros_like(self.gradients)
        self.invalid = torch.zeros_like(self.gradients, dtype=torch.bool)

    @staticmethod
    def _as_images(x: Tensor) -> Tensor:
        """Fold time into channels (B, T, C, H, W), or add axes to vectors (B, N) and rasters (B, T, N)."""
        if x.dim() > 4:
            return x.flatten(1, -3)
        return x.view(len(x), *[1] * (4 - x.dim()), *x.shape[1:])

    def natural(self, unit: Tensor) -> Tensor:
        """Return the library's points (B, ...) as inputs of the model, in shape, values and dtype."""
        return (self.domain.low + self.domain.width * unit.to(self.clean.dtype)).view(-1, *self.clean.shape[1:])

    def found(self, unit: Tensor) -> Tensor:
        """Return the library's result for the whole batch: what it left alone or spoiled is exactly the clean input."""
        finite = torch.isfinite(unit).flatten(1).all(1).view(-1, 1, 1, 1)
        moved = ((unit != self.unit) & finite).view(self.clean.shape)
        return torch.where(moved, self.natural(torch.where(finite, unit, self.unit)), self.clean)

    def asked(self, x: Tensor) -> Tensor | None:
        """Return which samples of the batch a library asks about, ``None`` where the model does not need to know.

        Raises:
            ValueError: if it does, and the library sends other than one point for each sample it was given.
        """
        if self.oracle.rest is None:
            return None
        if len(x) != len(self.clean):
            raise ValueError(
                f"the library sends {len(x)} points for {len(self.clean)} samples, so which other modalities belong to a "
                "point is not known: on dictionary inputs use its other algorithms, or an attack of sg_lightning"
            )
        return self.rows

    def forward(self, unit: Tensor) -> Tensor:
        """Return logits (B, K), float32; they may be differentiated with respect to ``unit``."""
        self.forwards += len(unit)
        x = self.natural(unit)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.oracle.logits(x, self.asked(x)).float()
        logits: Tensor = _Asked.apply(x, self)
        return logits.float()


class _Asked(Function):
    """The model as one node of the library's graph, whose backward gives the input's gradient only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shell: Shell) -> Tensor:
        logits, ctx.pull = shell.oracle.differentiable(x, shell.asked(x))
        ctx.shell = shell
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        found, shell = ctx.pull(upstream), ctx.shell
        if len(found.grad) == len(shell.clean):
            shell.gradients += 1
            shell.zero += found.zero
            shell.invalid |= found.invalid
        return found.grad, None
