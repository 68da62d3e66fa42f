"""The readable neuron: a loop over time in plain autograd, with one custom function, the spike.

Symbols as in the fused kernel: u_t membrane compared with theta, s_t = H(u_t - theta) the spike,
c_t what is carried to the next step.

| reset | u_t | c_t |
|---|---|---|
| none | beta c_{t-1} + x_t | u_t |
| zero | beta c_{t-1} + x_t | (1 - s_t) u_t |
| subtract | beta c_{t-1} + x_t | u_t - theta s_t |
| subtract, delayed | (beta c_{t-1} + x_t) - theta s_{t-1} | u_t |

The order of operations is as written; it makes the spikes equal to ``snntorch.Leaky`` bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from sg_lightning.neurons.base import Dynamics, compute_dtype
from sg_lightning.neurons.surrogates import Surrogate


class _Curvature(Function):
    """The derivative of the slope: where differentiation ends, with an error instead of a silent zero."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, rule: Surrogate) -> Tensor:
        ctx.rule = rule
        return rule.second_derivative(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        raise RuntimeError(f"third-order gradients through the surrogate {ctx.rule} are not available")


class _Slope(Function):
    """The surrogate's derivative, itself differentiable once where the surrogate is smooth."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, rule: Surrogate) -> Tensor:
        ctx.save_for_backward(z)
        ctx.rule = rule
        return rule.derivative(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return grad * _Curvature.apply(z, ctx.rule), None


class _Spike(Function):
    """The step function, whose gradient is the surrogate's."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, rule: Surrogate, fire_at_threshold: bool) -> Tensor:
        ctx.save_for_backward(z)
        ctx.rule = rule
        return (z >= 0 if fire_at_threshold else z > 0).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (z,) = ctx.saved_tensors
        return grad * slope(z, ctx.rule), None, None


def spike(z: Tensor, rule: Surrogate, fire_at_threshold: bool = False) -> Tensor:
    """Return H(z) as floats; its gradient is ``rule.derivative(z)``."""
    return _Spike.apply(z, rule, fire_at_threshold)


def slope(z: Tensor, rule: Surrogate) -> Tensor:
    """Return ``rule.derivative(z)``, differentiable once more or raising ``RuntimeError``, never silently wrong."""
    return _Slope.apply(z, rule)


def simulate(
    x: Tensor,
    beta: Tensor,
    theta: Tensor,
    dynamics: Dynamics,
    rule: Surrogate | Sequence[Surrogate],
    *,
    state: Tensor | None = None,
    spikes_before: Tensor | None = None,
    recurrent: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the neuron over time.

    Args:
        x: Input current (T, B, ...).
        beta: Leak in [0, 1], broadcastable to (B, ...).
        theta: Threshold, broadcastable to (B, ...).
        dynamics: Reset and firing rule.
        rule: Surrogate of the backward pass, or one per step.
        state: What an earlier call returned as its third value; ``None`` starts at 0.
        spikes_before: The last spikes (B, ...) of that call, which feed back where there is feedback; ``None``: none.
        recurrent: Maps the last spikes (B, ...) to a current that is added.

    Returns:
        Spikes (T, B, ...) in the dtype of ``x``, membranes u (T, B, ...), and the final state (B, ...):
        u_T with its reset still to come if ``reset_delay``, else c_T.
    """
    dtype = compute_dtype(x)
    beta, theta = beta.to(dtype), theta.to(dtype)
    zero, subtract = dynamics.reset == "zero", dynamics.reset == "subtract"

    def reset_signal(s: Tensor) -> Tensor:
        return s.detach() if dynamics.detach_reset else s

    of_step = [rule] * len(x) if isinstance(rule, Surrogate) else rule
    c = torch.zeros_like(x[0], dtype=dtype) if state is None else state.to(dtype)
    r = torch.zeros_like(c)
    s = r if spikes_before is None else spikes_before.to(dtype)
    if state is not None and dynamics.reset_delay:
        r = reset_signal(spike(c - theta, of_step[0], dynamics.fire_at_threshold))
        c = (1 - r) * c if zero else c

    spikes, membranes, u = [], [], c
    for x_t, rule_t in zip(x.unbind(0), of_step, strict=True):
        u = beta * c + x_t
        if recurrent is not None:
            u = u + recurrent(s.to(x.dtype))
        if dynamics.subtracts_late:
            u = u - r * theta
        s = spike(u - theta, rule_t, dynamics.fire_at_threshold)
        r = reset_signal(s)
        if zero:
            c = (1 - r) * u
        elif subtract and not dynamics.reset_delay:
            c = u - r * theta
        else:
            c = u
        spikes.append(s)
        membranes.append(u)
    return torch.stack(spikes).to(x.dtype), torch.stack(membranes), u if dynamics.reset_delay else c
