"""The Triton kernels as operators that a compiler sees through: ``torch.compile`` plans its own code around them.

To the operators of :mod:`~sg_lightning.neurons.operators`, which are closed boxes for a compiler, these are equal in
arguments, results and gradients. Import it only where Triton is.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from sg_lightning.neurons import operators, surrogates, triton_kernels
from sg_lightning.neurons.base import Dynamics


def _forward(
    x: Tensor, beta: Tensor, theta: Tensor, dynamics: str, rule: str, keep: bool, path: str
) -> tuple[Tensor, Tensor]:
    """Do ``sg_lightning::lif``."""
    kernel = wrap_triton(triton_kernels.forward_kernel)
    s, u = triton_kernels.launch_forward(kernel, x, beta, theta, Dynamics.of_code(dynamics), keep)
    return s, x.new_empty((0, 0), dtype=beta.dtype) if u is None else u


def _backward(
    g: Tensor | None, h: Tensor | None, u: Tensor, beta: Tensor, theta: Tensor, dynamics: str, rule: str,
    need_x: bool, need_beta: bool, need_theta: bool, dtype: torch.dtype, path: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Do ``sg_lightning::lif_backward``, for surrogates that the kernels know."""
    kernel, need = wrap_triton(triton_kernels.backward_kernel), (need_x, need_beta, need_theta)
    found = triton_kernels.launch_backward(
        kernel, g, h, u, beta, theta, Dynamics.of_code(dynamics), surrogates.of_code(rule), need, dtype
    )
    dx, dbeta, dtheta = (u.new_empty(0) if t is None else t for t in found)
    return dx, dbeta, dtheta


lif: Any = triton_op("sg_lightning::lif_triton", _forward, mutates_args=())
lif_backward: Any = triton_op("sg_lightning::lif_backward_triton", _backward, mutates_args=())
lif.register_autograd(
    functools.partial(operators.pull_back_lif, operator=lif_backward), setup_context=operators.keep_for_lif
)
lif_backward.register_autograd(operators.pull_back_backward, setup_context=operators.keep_for_backward)
