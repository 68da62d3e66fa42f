"""The neuron on CUDA: one Triton kernel per direction, with all time steps of a neuron in registers.

Forward reads the input once and writes spikes and membranes; backward reads membranes and upstream gradients
once and writes the gradient of the input. Gradients of beta and theta leave as one partial sum per block, added up
afterwards, so that results repeat to the bit. Products of the forward pass are rounded before anything is added to them
(``mul.rn``, which no compiler may contract), or spikes at the threshold would flip.

Import it only where Triton is: see :mod:`~sg_lightning.neurons.paths`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from sg_lightning.neurons import eager
from sg_lightning.neurons.base import Dynamics
from sg_lightning.neurons.eager import Gradients, Needs, reduced
from sg_lightning.neurons.surrogates import (
    Atan,
    Exponential,
    FastSigmoid,
    Gaussian,
    Rectangular,
    Sigmoid,
    StraightThrough,
    Surrogate,
    Triangular,
)

BLOCK = 512  # neurons of one program, four per thread
WARPS = 4
# The interpreter knows no libdevice, and contracts nothing; on ROCm, which lacks mul_rn, an option forbids it.
ROUNDED = not os.environ.get("TRITON_INTERPRET") and torch.version.hip is None
OPTIONS = {"num_warps": WARPS} if torch.version.hip is None else {"num_warps": WARPS, "enable_fp_fusion": False}

# Name and the two constants of each surrogate's formula in _slope; constants, since Triton passes numbers as float32.
_RULES: dict[type[Surrogate], Callable[[Any], tuple[str, float, float]]] = {
    Triangular: lambda r: ("triangular", r.width, 1 / r.width**2),
    Atan: lambda r: ("atan", 2 / r.alpha, r.alpha * math.pi**2 / 2),
    FastSigmoid: lambda r: ("fast_sigmoid", r.slope, 0.0),
    Sigmoid: lambda r: ("sigmoid", r.slope, 0.0),
    Rectangular: lambda r: ("rectangular", r.width / 2, 1 / r.width),
    Gaussian: lambda r: ("gaussian", -1 / (2 * r.sigma**2), 1 / (r.sigma * math.sqrt(2 * math.pi))),
    Exponential: lambda r: ("exponential", r.slope, r.peak),
    StraightThrough: lambda r: ("straight_through", 0.0, 0.0),
}


@triton.jit
def _times(a, b, ROUNDED: tl.constexpr):  # noqa: ANN001, ANN202
    return libdevice.mul_rn(a, b) if ROUNDED else a * b


@triton.jit
def _slope(z, RULE: tl.constexpr, A: tl.constexpr, B: tl.constexpr):  # noqa: ANN001, ANN202
    if RULE == "triangular":
        phi = tl.maximum(A - tl.abs(z), 0.0) * B
    elif RULE == "atan":
        phi = 1.0 / (A + B * z * z)
    elif RULE == "fast_sigmoid":
        root = 1.0 + A * tl.abs(z)
        phi = 1.0 / (root * root)
    elif RULE == "sigmoid":
        e = tl.exp(-A * tl.abs(z))
        phi = A * e / ((1.0 + e) * (1.0 + e))
    elif RULE == "rectangular":
        phi = (tl.abs(z) < A).to(z.dtype) * B
    elif RULE == "gaussian":
        phi = B * tl.exp(A * z * z)
    elif RULE == "exponential":
        phi = B * tl.exp(-A * tl.abs(z))
    else:
        phi = z * 0.0 + 1.0
    return phi


@triton.jit
def forward_kernel(  # noqa: ANN201
    x, spikes, membranes, beta, theta,  # noqa: ANN001
    steps, size, x_stride,  # noqa: ANN001
    RESET: tl.constexpr, LATE: tl.constexpr, EQUAL: tl.constexpr, KEEP: tl.constexpr,
    BETAS: tl.constexpr, THETAS: tl.constexpr, BLOCK: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """Run ``BLOCK`` neurons over all steps; beta and theta are vectors where ``BETAS`` and ``THETAS`` say so."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    b = tl.load(beta + at, mask=inside, other=0.0) if BETAS else tl.load(beta)
    th = tl.load(theta + at, mask=inside, other=1.0) if THETAS else tl.load(theta)
    c = tl.zeros([BLOCK], dtype=b.dtype)
    s = tl.zeros([BLOCK], dtype=b.dtype)
    x += at
    spikes += at
    membranes += at
    for _ in range(steps):
        u = _times(b, c, ROUNDED) + tl.load(x, mask=inside, other=0.0).to(b.dtype)
        if LATE:
            u = u - _times(s, th, ROUNDED)
        s = (u >= th if EQUAL else u > th).to(b.dtype)
        if RESET == "zero":
            c = _times(1.0 - s, u, ROUNDED)
        elif RESET == "subtract" and not LATE:
            c = u - _times(s, th, ROUNDED)
        else:
            c = u
        tl.store(spikes, s.to(spikes.dtype.element_ty), mask=inside)
        if KEEP:
            tl.store(membranes, u, mask=inside)
            membranes += size
        x += x_stride
        spikes += size


@triton.jit
def backward_kernel(  # noqa: ANN201
    g, h, u, dx, dbeta, dtheta, beta, theta,  # noqa: ANN001
    steps, size, g_stride,  # noqa: ANN001
    RESET: tl.constexpr, LATE: tl.constexpr, ATTACHED: tl.constexpr, EQUAL: tl.constexpr,
    RULE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, HAS_G: tl.constexpr, HAS_H: tl.constexpr,
    NEED_X: tl.constexpr, NEED_BETA: tl.constexpr, NEED_THETA: tl.constexpr,
    BETAS: tl.constexpr, THETAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scan ``BLOCK`` neurons backwards; gradients of scalar beta and theta are sums of the block, at its number."""
    number = tl.program_id(0)
    at = number.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    b = tl.load(beta + at, mask=inside, other=0.0) if BETAS else tl.load(beta)
    th = tl.load(theta + at, mask=inside, other=1.0) if THETAS else tl.load(theta)
    later = tl.zeros([BLOCK], dtype=b.dtype)
    to_beta = tl.zeros([BLOCK], dtype=b.dtype)
    to_theta = tl.zeros([BLOCK], dtype=b.dtype)
    last = at + tl.cast(size, tl.int64) * (steps - 1)
    u += last
    dx += last
    h += last
    g += at + tl.cast(g_stride, tl.int64) * (steps - 1)
    for _ in range(steps):
        u_t = tl.load(u, mask=inside, other=0.0)
        phi = _slope(u_t - th, RULE, A, B)
        s = (u_t >= th if EQUAL else u_t > th).to(b.dtype)
        r = later if LATE else b * later  # the gradient of what a spike changes
        q = tl.zeros([BLOCK], dtype=b.dtype)
        if HAS_G:
            q = tl.load(g, mask=inside, other=0.0).to(b.dtype)
            g -= g_stride
        if ATTACHED:
            q = q - r * (u_t if RESET == "zero" else th)
        if NEED_BETA:
            if RESET == "zero":
                to_beta += later * (1.0 - s) * u_t
            elif RESET == "subtract" and not LATE:
                to_beta += later * (u_t - s * th)
            else:
                to_beta += later * u_t
        if NEED_THETA:
            to_theta -= phi * q
            if RESET == "subtract":
                to_theta -= s * r
        d = phi * q + ((1.0 - s) * r if RESET == "zero" else b * later)
        if HAS_H:
            d += tl.load(h, mask=inside, other=0.0)
            h -= size
        if NEED_X:
            tl.store(dx, d.to(dx.dtype.element_ty), mask=inside)
            dx -= size
        later = d
        u -= size
    if NEED_BETA:
        if BETAS:
            tl.store(dbeta + at, to_beta, mask=inside)
        else:
            tl.store(dbeta + number, tl.sum(tl.where(inside, to_beta, 0.0), axis=0))
    if NEED_THETA:
        if THETAS:
            tl.store(dtheta + at, to_theta, mask=inside)
        else:
            tl.store(dtheta + number, tl.sum(tl.where(inside, to_theta, 0.0), axis=0))


def forward(x: Tensor, beta: Tensor, theta: Tensor, dynamics: Dynamics, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Do :func:`eager.forward <sg_lightning.neurons.eager.forward>` in one kernel."""
    with torch.cuda.device_of(x):
        return launch_forward(forward_kernel, x, beta, theta, dynamics, keep)


def launch_forward(
    kernel: Any, x: Tensor, beta: Tensor, theta: Tensor, dynamics: Dynamics, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Do it by ``kernel``, which is :func:`forward_kernel`, perhaps wrapped for a compiler to see it."""
    steps, size = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    spikes = torch.empty((steps, size), dtype=x.dtype, device=x.device)
    membranes = torch.empty((steps, size), dtype=beta.dtype, device=x.device) if keep else None
    if spikes.numel():
        kernel[(_blocks(size),)](
            x, spikes, spikes if membranes is None else membranes, beta, theta, steps, size, x.stride(0),
            RESET=dynamics.reset, LATE=dynamics.subtracts_late, EQUAL=dynamics.fire_at_threshold, KEEP=keep,
            BETAS=beta.dim() > 0, THETAS=theta.dim() > 0, BLOCK=BLOCK, ROUNDED=ROUNDED, **OPTIONS,
        )  # fmt: skip
    return spikes, membranes


def backward(
    g: Tensor | None,
    h: Tensor | None,
    u: Tensor,
    beta: Tensor,
    theta: Tensor,
    dynamics: Dynamics,
    rule: Surrogate,
    need: Needs,
    dtype: torch.dtype,
) -> Gradients:
    """Do :func:`eager.backward <sg_lightning.neurons.eager.backward>` in one kernel; for foreign surrogates, call it."""
    if not knows(rule) or not u.numel():
        return eager.backward(g, h, u, beta, theta, dynamics, rule, need, dtype)
    with torch.cuda.device_of(u):
        return launch_backward(backward_kernel, g, h, u, beta, theta, dynamics, rule, need, dtype)


def launch_backward(
    kernel: Any,
    g: Tensor | None,
    h: Tensor | None,
    u: Tensor,
    beta: Tensor,
    theta: Tensor,
    dynamics: Dynamics,
    rule: Surrogate,
    need: Needs,
    dtype: torch.dtype,
) -> Gradients:
    """Do it by ``kernel``, which is :func:`backward_kernel`, perhaps wrapped for a compiler to see it."""
    name, a, b = _RULES[type(rule)](rule)
    steps, size = u.shape
    blocks = _blocks(size)
    g = g if g is None or g.stride(1) == 1 else g.contiguous()
    h = h if h is None else h.contiguous()
    dx = torch.empty((steps, size), dtype=dtype, device=u.device) if need[0] else None
    dbeta, dtheta = (
        torch.empty(size if p.dim() else blocks, dtype=u.dtype, device=u.device) if n else None
        for p, n in ((beta, need[1]), (theta, need[2]))
    )
    kernel[(blocks,)](
        *(u if t is None else t for t in (g, h)), u, *(u if t is None else t for t in (dx, dbeta, dtheta)),
        beta, theta, steps, size, 0 if g is None else g.stride(0),
        RESET=dynamics.reset, LATE=dynamics.subtracts_late,
        ATTACHED=not dynamics.detach_reset and dynamics.reset != "none", EQUAL=dynamics.fire_at_threshold,
        RULE=name, A=a, B=b, HAS_G=g is not None, HAS_H=h is not None,
        NEED_X=need[0], NEED_BETA=need[1], NEED_THETA=need[2],
        BETAS=beta.dim() > 0, THETAS=theta.dim() > 0, BLOCK=BLOCK, **OPTIONS,
    )  # fmt: skip
    return dx, reduced(dbeta, beta), reduced(dtheta, theta)


def knows(rule: Surrogate) -> bool:
    """Tell whether the kernels have the formula of a surrogate."""
    return type(rule) in _RULES


def _blocks(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK
