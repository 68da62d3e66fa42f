"""Average pooling by two, at the speed of memory: torch's takes as long as a convolution on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function


class AvgPool2(nn.AvgPool2d):
    """``nn.AvgPool2d(2)``: means of 2 x 2 pixels; an odd last row or column is left out.

    Means of spikes are exact. For other values the order of a sum differs from torch's, so the last bit may. Unlike torch's,
    it keeps no activation for the backward pass. On a GPU, in channels-last layout and under ``torch.compile`` it is
    torch's own.

    Shape:
        (B, C, H, W) to (B, C, H // 2, W // 2).
    """

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the means."""
        slow = x.device.type == "cpu" and x.is_contiguous() and not torch.compiler.is_compiling()
        if not slow or x.dtype not in (torch.float32, torch.float64, torch.bfloat16) or x.dim() < 3 or 0 in x.shape:
            return super().forward(x)
        height, width = (side - side % 2 for side in x.shape[-2:])
        if not height or not width:
            return super().forward(x)  # which says what is wrong
        x = x[..., :height, :width]
        # An autograd function costs more than the means of a small tensor.
        means: Tensor = _Means.apply(x) if x.requires_grad and torch.is_grad_enabled() else _Means.forward(x)
        return means

    def extra_repr(self) -> str:
        """Say nothing: there are no settings."""
        return ""


class _Linear(Function):
    """A linear map: its gradient needs nothing of its input."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keep nothing."""


class _Means(_Linear):
    """Means of 2 x 2 pixels of a tensor with even sides."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        rows = x.unflatten(-2, (height // 2, 2))
        pairs = (rows[..., 0, :] + rows[..., 1, :]).unflatten(-1, (width // 2, 2))
        return (pairs[..., 0] + pairs[..., 1]).mul_(0.25)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        spread: Tensor = _Spread.apply(grad)
        return spread


class _Spread(_Linear):
    """A quarter of every value for each of 2 x 2 pixels: the gradient of the means, as they are of its own."""

    @staticmethod
    def forward(grad: Tensor) -> Tensor:
        height, width = grad.shape[-2:]
        quarter = grad * 0.25
        spread = quarter.new_empty((*grad.shape[:-2], height, 2, width, 2))
        spread[..., 0, :, 0] = quarter
        spread[..., 0, :, 1] = quarter
        spread[..., 1, :, :] = spread[..., 0, :, :]
        return spread.view(*grad.shape[:-2], 2 * height, 2 * width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        means: Tensor = _Means.apply(grad)
        return means
