"""The recurrent neuron's loop over time with a closed-form backward pass.

Beside what :mod:`~sg_lightning.neurons.eager` describes, a spike changes the next membrane through the feedback W:
with d_t = dL/du_t,

    q_t = g_t + W^T d_{t+1} + kappa b_t d_{t+1},    dL/dW = sum_t d_{t+1} s_t^T,    dL/dbias = sum_t d_t

so a step of the reverse scan is one product with W, and the gradient of W one product over all steps. Only u is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from sg_lightning.neurons import reference
from sg_lightning.neurons.base import Dynamics, compute_dtype
from sg_lightning.neurons.eager import carried, reduced
from sg_lightning.neurons.surrogates import Surrogate


def serves(feedback: nn.Module) -> bool:
    """Tell whether a feedback is a linear layer as it is, whose weights say all."""
    hooks = (feedback._forward_hooks, feedback._forward_pre_hooks, feedback._backward_hooks)
    return type(feedback) is nn.Linear and not any(hooks)


def simulate(
    x: Tensor, feedback: nn.Linear, beta: Tensor, theta: Tensor, dynamics: Dynamics, rule: Surrogate
) -> Tensor:
    """Run the neuron over time, from rest.

    Args:
        x: Input current (T, B, N).
        feedback: Maps the last spikes (B, N) to a current that is added.
        beta: Leak in [0, 1], scalar or (N,).
        theta: Threshold, scalar or (N,).
        dynamics: Reset and firing rule.
        rule: Surrogate of the backward pass.

    Returns:
        Spikes (T, B, N) in the dtype of ``x``, those of :func:`reference.simulate
        <sg_lightning.neurons.reference.simulate>` to the bit.
    """
    dtype = compute_dtype(x)
    beta, theta, weight = beta.to(dtype), theta.to(dtype), feedback.weight
    inputs = [t for t in (x, weight, feedback.bias, beta, theta) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return _Loop.apply(x, weight, feedback.bias, beta, theta, dynamics, rule)[0]
    return _forward(x, weight, feedback.bias, beta, theta, dynamics, keep=False)[0].to(x.dtype)


def _feedback_dtype(x: Tensor) -> torch.dtype:
    """Return the precision of the product with W: autocast lowers that of all but float64."""
    device = x.device.type
    return (
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and x.dtype != torch.float64 else x.dtype
    )


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, beta: Tensor, theta: Tensor, dynamics: Dynamics, *, keep: bool
) -> tuple[Tensor, Tensor]:
    """Return spikes (T, B, N) as floats of the membrane's precision, and membranes, of the last step only unless ``keep``."""
    spikes = torch.empty(x.shape, dtype=beta.dtype, device=x.device)
    membranes = torch.empty(x.shape if keep else (1, *x.shape[1:]), dtype=beta.dtype, device=x.device)
    dtype = _feedback_dtype(x)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    c, fires = torch.zeros_like(membranes[0]), torch.ge if dynamics.fire_at_threshold else torch.gt
    carry = torch.empty_like(c)
    before: Tensor | None = None
    for t, (x_t, s) in enumerate(zip(x.unbind(0), spikes.unbind(0), strict=True)):
        u = membranes[t if keep else 0]
        torch.mul(beta, c, out=u)
        u.add_(x_t)
        if before is not None:
            u.add_(functional.linear(before.to(dtype), weight, bias))
            if dynamics.subtracts_late:
                u.addcmul_(before, theta, value=-1)
        elif bias is not None:
            u.add_(bias)
        fires(u, theta, out=s)
        if dynamics.reset == "zero":
            c = torch.addcmul(u, u, s, value=-1, out=carry)
        elif dynamics.reset == "subtract" and not dynamics.reset_delay:
            c = torch.addcmul(u, s, theta, value=-1, out=carry)
        else:
            c = u
        before = s
    return spikes, membranes


class _Loop(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, beta: Tensor, theta: Tensor, dynamics: Dynamics,
        rule: Surrogate,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        spikes, membranes = _forward(x, weight, bias, beta, theta, dynamics, keep=True)
        # u is an output so that, in a double backward, what depends on it is differentiated through this node again.
        ctx.save_for_backward(membranes, weight, beta, theta)
        ctx.set_materialize_grads(False)
        ctx.dynamics, ctx.rule, ctx.dtype, ctx.feedback_dtype = dynamics, rule, x.dtype, _feedback_dtype(x)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return spikes.to(x.dtype), membranes

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None and h is None:
            return (None,) * 7
        u, weight, beta, theta = ctx.saved_tensors
        dynamics, lower, needs = ctx.dynamics, ctx.feedback_dtype, ctx.needs_input_grad
        low = weight.to(lower)
        z = u - theta
        phi = reference.slope(z, ctx.rule)
        s = reference.spike(z, ctx.rule, dynamics.fire_at_threshold)  # a function of u too, for second derivatives
        reset = s.detach() if dynamics.detach_reset else s
        g = torch.zeros_like(u) if g is None else g.to(u.dtype)
        first = phi * g if h is None else phi * g + h
        factor = _carry(u, reset, phi, beta, theta, dynamics)
        factors = factor.unbind(0) if factor.dim() == u.dim() else [factor] * len(u)
        steps = [first[-1]]
        for now, phi_t, factor_t in reversed(list(zip(first[:-1], phi[:-1], factors[: len(u) - 1], strict=True))):
            back = (steps[-1].to(lower) @ low).to(u.dtype)
            steps.append(torch.addcmul(torch.addcmul(now, factor_t, steps[-1]), phi_t, back))
        d = torch.stack(steps[::-1])
        after, u_b = d[1:], u[:-1]
        dweight = dbias = dbeta = dtheta = None
        if needs[1]:
            dweight = (after.flatten(0, 1).to(lower).T @ s[:-1].flatten(0, 1).to(lower)).to(weight.dtype)
        if needs[2]:
            dbias = d.sum((0, 1)).to(ctx.bias_dtype)
        if needs[3]:
            dbeta = reduced((after * carried(u_b, reset[:-1], theta, dynamics)).sum((0, 1)), beta)
        if needs[4]:
            r = after if dynamics.subtracts_late else after * beta  # the gradient of what a spike changes
            q = g[:-1] + (after.to(lower) @ low).to(u.dtype)
            if not dynamics.detach_reset and dynamics.reset != "none":
                q = q - r * (u_b if dynamics.reset == "zero" else theta)
            total = -(phi[:-1] * q).sum((0, 1)) - (phi[-1] * g[-1]).sum(0)
            if dynamics.reset == "subtract":
                total = total - (reset[:-1] * r).sum((0, 1))
            dtheta = reduced(total, theta)
        return d.to(ctx.dtype) if needs[0] else None, dweight, dbias, dbeta, dtheta, None, None


def _carry(u: Tensor, s: Tensor, phi: Tensor, beta: Tensor, theta: Tensor, dynamics: Dynamics) -> Tensor:
    """Return a_t + kappa b_t phi_t, of the shape of ``u`` or of beta; unlike that of ``eager``, it can be differentiated."""
    attached = not dynamics.detach_reset
    if dynamics.reset == "zero":
        return beta * ((1 - s) - u * phi if attached else 1 - s)
    if dynamics.reset == "none" or not attached:
        return beta
    return beta - phi * (theta if dynamics.reset_delay else beta * theta)
