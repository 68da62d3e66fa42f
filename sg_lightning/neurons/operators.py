"""The neuron as operators that torch knows: ``torch.compile``, fake tensors and autocast see through or around them.

``lif`` gives spikes and membranes, ``lif_backward`` its gradients and ``lif_double_backward`` theirs. The result of the
last is the Jacobian of a surrogate gradient field: not a Hessian, not symmetric. Which code runs inside
is chosen call by call in :mod:`~sg_lightning.neurons.paths`.

An operator takes plain values only: dynamics and surrogates travel as their ``code``.

Calling an operator through the dispatcher costs some 80 us per layer and step, which small networks feel. So :func:`run`
calls the same functions through an autograd function, and takes the operators only while torch compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.library import custom_op

from sg_lightning.neurons import paths, surrogates
from sg_lightning.neurons.base import Dynamics
from sg_lightning.neurons.eager import double_backward
from sg_lightning.neurons.surrogates import Surrogate


def _forward(
    x: Tensor,
    beta: Tensor,
    theta: Tensor,
    dynamics: str,
    rule: str,
    keep: bool,
    path: str,
) -> tuple[Tensor, Tensor]:
    """Run (T, N) neurons from rest: spikes in the dtype of ``x``, membranes in that of ``beta``, empty unless ``keep``."""
    with torch.no_grad():
        x, beta, theta = x.detach(), beta.detach(), theta.detach()
        options = Dynamics.of_code(dynamics)
        s, u = paths.forward_of(path, x, options, keep)(x, beta, theta, options, keep)
    return s, x.new_empty((0, 0), dtype=beta.dtype) if u is None else u


lif = custom_op("sg_lightning::lif", _forward, mutates_args=())


@lif.register_fake
def _(
    x: Tensor,
    beta: Tensor,
    theta: Tensor,
    dynamics: str,
    rule: str,
    keep: bool,
    path: str,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if keep else (0, 0), dtype=beta.dtype)


def _backward(
    g: Tensor | None,
    h: Tensor | None,
    u: Tensor,
    beta: Tensor,
    theta: Tensor,
    dynamics: str,
    rule: str,
    need_x: bool,
    need_beta: bool,
    need_theta: bool,
    dtype: torch.dtype,
    path: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``x`` (in ``dtype``), ``beta`` and ``theta``; those not needed are empty."""
    with torch.no_grad():
        g, h = (None if t is None else t.detach() for t in (g, h))
        u, beta, theta = u.detach(), beta.detach(), theta.detach()
        options, surrogate, need = Dynamics.of_code(dynamics), surrogates.of_code(rule), (need_x, need_beta, need_theta)
        run = paths.backward_of(path, u, options, surrogate, dtype)
        found = run(g, h, u, beta, theta, options, surrogate, need, dtype)
    dx, dbeta, dtheta = (u.new_empty(0) if t is None else t for t in found)
    return dx, dbeta, dtheta


lif_backward = custom_op("sg_lightning::lif_backward", _backward, mutates_args=())


@lif_backward.register_fake
def _(
    g: Tensor | None,
    h: Tensor | None,
    u: Tensor,
    beta: Tensor,
    theta: Tensor,
    dynamics: str,
    rule: str,
    need_x: bool,
    need_beta: bool,
    need_theta: bool,
    dtype: torch.dtype,
    path: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        u.new_empty(u.shape, dtype=dtype) if need_x else u.new_empty(0),
        u.new_empty(beta.shape if need_beta else 0),
        u.new_empty(theta.shape if need_theta else 0),
    )


@custom_op("sg_lightning::lif_double_backward", mutates_args=())
def lif_double_backward(
    w: Tensor | None,
    v_beta: Tensor | None,
    v_theta: Tensor | None,
    g: Tensor | None,
    h: Tensor | None,
    u: Tensor,
    beta: Tensor,
    theta: Tensor,
    dynamics: str,
    rule: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of w . dx + v_beta . dbeta + v_theta . dtheta to g, h, u, beta and theta."""
    with torch.no_grad():
        return double_backward(
            w, v_beta, v_theta, g, h, u, beta, theta, Dynamics.of_code(dynamics), surrogates.of_code(rule)
        )


@lif_double_backward.register_fake
def _(
    w: Tensor | None,
    v_beta: Tensor | None,
    v_theta: Tensor | None,
    g: Tensor | None,
    h: Tensor | None,
    u: Tensor,
    beta: Tensor,
    theta: Tensor,
    dynamics: str,
    rule: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(u), torch.empty_like(u), torch.empty_like(u), torch.empty_like(beta), torch.empty_like(theta),
    )  # fmt: skip


class _Rough(Function):
    """The identity, in front of what a second derivative would be needed for: an error instead of a silent zero."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, rule: Surrogate) -> Tensor:
        ctx.rule = rule
        return p.view_as(p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.rule.second_derivative(grad), None


def keep_for_lif(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what :func:`pull_back_lif` needs."""
    x, beta, theta, ctx.dynamics, ctx.rule, ctx.keep, ctx.path = inputs
    # u is an output so that, in a double backward, what depends on it is differentiated through this node again.
    ctx.save_for_backward(output[1], beta, theta)
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.direct = x.dtype, False


def pull_back_lif(
    ctx: Any, g: Tensor | None, h: Tensor | None, operator: Callable[..., Any] = lif_backward
) -> tuple[Tensor | None, ...]:
    """Pull gradients back through ``lif`` by ``operator``."""
    u, beta, theta = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    if g is None and h is None:
        return (None,) * 7
    if not ctx.keep:
        raise RuntimeError("sg_lightning::lif ran with keep=False: gradients need the membranes, pass keep=True")
    if torch.is_grad_enabled():  # under create_graph
        rule = surrogates.of_code(ctx.rule)
        if not rule.smooth:
            u, theta = _Rough.apply(u, rule), _Rough.apply(theta, rule)
    # Under create_graph its gradient is wanted, which the operator knows.
    pull: Callable[..., Any] = _backward if ctx.direct and not torch.is_grad_enabled() else operator
    found = pull(g, h, u, beta, theta, ctx.dynamics, ctx.rule, *need, ctx.dtype, ctx.path)
    return (*(t if n else None for t, n in zip(found, need, strict=True)), *(None,) * 4)


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what :func:`pull_back_backward` needs."""
    g, h, u, beta, theta, ctx.dynamics, ctx.rule, ctx.need_x, ctx.need_beta, ctx.need_theta, _, _ = inputs
    ctx.has = (g is not None, h is not None)
    ctx.save_for_backward(*(t for t in (g, h) if t is not None), u, beta, theta)
    ctx.set_materialize_grads(False)


def pull_back_backward(ctx: Any, w: Tensor | None, v_beta: Tensor | None, v_theta: Tensor | None) -> tuple[Any, ...]:
    """Pull gradients back through ``lif_backward``."""
    *upstream, u, beta, theta = ctx.saved_tensors
    g, h = (upstream.pop(0) if has else None for has in ctx.has)
    w, v_beta, v_theta = (
        v if need else None
        for v, need in ((w, ctx.need_x), (v_beta, ctx.need_beta), (v_theta, ctx.need_theta))
    )  # fmt: skip
    if w is None and v_beta is None and v_theta is None:
        return (None,) * 12
    dg, dh, du, dbeta, dtheta = lif_double_backward(w, v_beta, v_theta, g, h, u, beta, theta, ctx.dynamics, ctx.rule)
    return (
        None if g is None else dg.to(g.dtype), None if h is None else dh, du, dbeta, dtheta, *(None,) * 7,
    )  # fmt: skip


def _keep_rule(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.rule = inputs[-1]


def _refuse(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
    raise RuntimeError(f"third-order gradients through the surrogate {ctx.rule} are not available")


lif.register_autograd(pull_back_lif, setup_context=keep_for_lif)
lif_backward.register_autograd(pull_back_backward, setup_context=keep_for_backward)
lif_double_backward.register_autograd(_refuse, setup_context=_keep_rule)


class _Direct(Function):
    """The operator ``lif`` with its gradient, without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        keep_for_lif(ctx, inputs, output)
        ctx.direct = True
        return output

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        return pull_back_lif(ctx, g, h)


def _seen_through(device: str, rule: str, path: str) -> bool:
    """Tell whether a compiler gets the Triton kernels themselves; what it compiles is for one answer."""
    if paths.without_triton(device) or not (path == "triton" or (path == "auto" and device == "cuda")):
        return False
    from sg_lightning.neurons import triton_kernels, triton_operators  # noqa: F401 - defines the operators

    return triton_kernels.knows(surrogates.of_code(rule))


# What torch.compiler.assume_constant_result does; calling that would import the compiler, which takes seconds.
_seen_through._dynamo_marked_constant = True  # type: ignore[attr-defined]


def run(
    x: Tensor, beta: Tensor, theta: Tensor, dynamics: str, rule: str, keep: bool, path: str
) -> tuple[Tensor, Tensor]:
    """Do ``lif``, in the cheapest way that serves the caller."""
    if torch.compiler.is_compiling():
        operator = torch.ops.sg_lightning.lif_triton if _seen_through(x.device.type, rule, path) else lif
        return operator(x, beta, theta, dynamics, rule, keep, path)
    if not keep:
        return _forward(x, beta, theta, dynamics, rule, keep, path)
    return _Direct.apply(x, beta, theta, dynamics, rule, keep, path)
