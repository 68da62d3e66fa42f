"""The fast neuron: one autograd function over all time steps, in plain torch operations.

It computes what :mod:`~sg_lightning.neurons.reference` computes: equal spikes, and gradients equal up to
rounding, through a closed-form reverse scan. With g_t = dL/ds_t, h_t = dL/du_t from outside, phi_t the
surrogate's derivative at u_t - theta, and kappa = 0 if the reset is detached, else 1:

    q_t = g_t + kappa b_t d_{t+1},    d_t = phi_t q_t + a_t d_{t+1} + h_t,    dL/dx_t = d_t
    dL/dbeta = sum_t d_{t+1} c_t,     dL/dtheta = sum_t (e_t d_{t+1} - phi_t q_t)

|     | none | zero | subtract | subtract, delayed |
|-----|------|------|----------|-------------------|
| a_t | beta | beta (1 - s_t) | beta | beta |
| b_t | 0 | -beta u_t | -beta theta | -theta |
| e_t | 0 | 0 | -beta s_t | -s_t |

Only u is kept for the backward pass; the spikes are recomputed from it. On a CPU the work goes block by block
so that a block's rows stay in the cache, and masks are floats: bool tensors are several times slower there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from sg_lightning.neurons.base import Dynamics, compute_dtype
from sg_lightning.neurons.reference import slope, spike
from sg_lightning.neurons.surrogates import Surrogate

_CPU_BLOCK = 32_768  # neurons: a time step's rows stay in the cache
_CHUNK = 65_536  # elements, time steps times neurons: what the reverse scan prepares at once


def simulate(
    x: Tensor, beta: Tensor, theta: Tensor, dynamics: Dynamics, rule: Surrogate, *, membrane: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Run the neuron over time, from rest.

    Args:
        x: Input current (T, B, ...).
        beta: Leak in [0, 1], scalar or one per channel (axis 2 of ``x``).
        theta: Threshold, scalar or one per channel.
        dynamics: Reset and firing rule.
        rule: Surrogate of the backward pass.
        membrane: Whether u is wanted although no gradient is.

    Returns:
        Spikes (T, B, ...) in the dtype of ``x``, and the membranes u (T, B, ...) if they were kept.
    """
    # Neurons are independent, so any dense layout (channels-last too) is a matrix (T, N) without a copy.
    order = [0, *sorted(range(1, x.dim()), key=x.stride, reverse=True)]
    inverse = [order.index(axis) for axis in range(x.dim())]
    rows = x.permute(order)

    def per_neuron(p: Tensor) -> Tensor:
        p = p.to(compute_dtype(x))
        if p.dim() == 0:
            return p
        shape = (1, -1) + (1,) * (x.dim() - 3)
        return p.view(shape).expand(x.shape[1:]).permute([axis - 1 for axis in order[1:]]).reshape(-1)

    def restore(y: Tensor) -> Tensor:
        return y.view(rows.shape).permute(inverse)

    flat, beta, theta = rows.reshape(x.shape[0], -1), per_neuron(beta), per_neuron(theta)
    if torch.is_grad_enabled() and (flat.requires_grad or beta.requires_grad or theta.requires_grad):
        s, u = _FusedLIF.apply(flat, beta, theta, dynamics, rule)
    else:
        s, u = _forward(flat, beta, theta, dynamics, keep=membrane)
    return restore(s), None if u is None else restore(u)


class _FusedLIF(Function):
    """Spikes and membranes of (T, N) neurons; beta and theta are scalars or vectors (N,)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, beta: Tensor, theta: Tensor, dynamics: Dynamics, rule: Surrogate
    ) -> tuple[Tensor, Tensor]:
        s, u = _forward(x, beta, theta, dynamics, keep=True)
        assert u is not None
        # u is an output so that, in a double backward, what depends on it is differentiated through this node again.
        ctx.save_for_backward(u, beta, theta)
        ctx.set_materialize_grads(False)
        ctx.dynamics, ctx.rule, ctx.dtype = dynamics, rule, x.dtype
        return s, u

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        u, beta, theta = ctx.saved_tensors
        need = ctx.needs_input_grad[:3]
        if g is None and h is None:
            return None, None, None, None, None
        scan = _differentiable_scan if torch.is_grad_enabled() else _scan  # grad mode is on under create_graph
        dx, dbeta, dtheta = scan(g, h, u, beta, theta, ctx.dynamics, ctx.rule, need, ctx.dtype)
        return dx, dbeta, dtheta, None, None


def _blocks(size: int, device: torch.device) -> Iterator[slice]:
    step = _CPU_BLOCK if device.type == "cpu" else max(size, 1)
    return (slice(low, min(low + step, size)) for low in range(0, size, step))


def _part(p: Tensor, block: slice) -> Tensor:
    return p[block] if p.dim() else p


def _forward(x: Tensor, beta: Tensor, theta: Tensor, dynamics: Dynamics, *, keep: bool) -> tuple[Tensor, Tensor | None]:
    dtype = beta.dtype
    spikes = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    membranes = torch.empty(x.shape, dtype=dtype, device=x.device) if keep else None
    fires = torch.ge if dynamics.fire_at_threshold else torch.gt
    for block in _blocks(x.shape[1], x.device):
        b, th = _part(beta, block), _part(theta, block)
        width = block.stop - block.start
        c, fired, u = (torch.empty(width, dtype=dtype, device=x.device) for _ in range(3))
        u_rows = membranes[:, block].unbind(0) if membranes is not None else None
        for t, (x_t, s_t) in enumerate(zip(x[:, block].unbind(0), spikes[:, block].unbind(0), strict=True)):
            # Products with a spike are exact, so the order of operations of the reference is kept bit for bit.
            before, s = fired, (s_t if s_t.dtype == dtype else fired)
            u = u_rows[t] if u_rows is not None else u
            if t == 0:
                u.copy_(x_t)
            else:
                torch.mul(c, b, out=u).add_(x_t)
                if dynamics.subtracts_late:
                    u.addcmul_(before, th, value=-1)
            fires(u, th, out=s)
            if dynamics.reset == "zero":
                torch.addcmul(u, u, s, value=-1, out=c)
            elif dynamics.reset == "subtract" and not dynamics.reset_delay:
                torch.addcmul(u, s, th, value=-1, out=c)
            else:
                c = u
            fired = s
            if s is not s_t:
                s_t.copy_(s)
    return spikes, membranes


def _scan(
    g: Tensor | None,
    h: Tensor | None,
    u: Tensor,
    beta: Tensor,
    theta: Tensor,
    dynamics: Dynamics,
    rule: Surrogate,
    need: tuple[bool, bool, bool],
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of input, beta and theta that are needed.

    The scan is linear, d_t = (phi_t g_t + h_t) + (a_t + kappa b_t phi_t) d_{t+1}: both brackets are computed for
    many steps at once, which leaves one operation per step.
    """
    need_x, need_beta, need_theta = need
    steps, size = u.shape
    dx = torch.empty(u.shape, dtype=dtype, device=u.device) if need_x else None
    dbeta, dtheta = (torch.zeros(size, dtype=u.dtype, device=u.device) if n else None for n in (need_beta, need_theta))
    for block in _blocks(size, u.device):
        b, th = _part(beta, block), _part(theta, block)
        in_place = dx is not None and dx.dtype == u.dtype
        d = dx[:, block] if dx is not None and in_place else torch.empty_like(u[:, block])
        chunk = max(1, _CHUNK // d.shape[1]) if u.device.type == "cpu" else steps
        for start in range((steps - 1) // chunk * chunk, -1, -chunk):
            rows = slice(start, min(start + chunk, steps))
            u_c, d_c = u[rows, block], d[rows]
            phi = rule.derivative(u_c - th)
            if g is None:
                d_c.zero_()
            else:
                torch.mul(phi, g[rows, block], out=d_c)
            if h is not None:
                d_c.add_(h[rows, block])
            carry = carry_factor(u_c, phi, b, th, dynamics)
            after = d[start + 1 : rows.stop + 1]
            factors = carry.unbind(0) if carry.dim() == 2 else [carry] * len(after)
            for d_t, factor, later in reversed(list(zip(d_c.unbind(0), factors, after.unbind(0), strict=False))):
                d_t.addcmul_(factor, later)
            s = _fired(u_c, th, dynamics)[: len(after)] if dbeta is not None or dtheta is not None else u_c
            if dbeta is not None:
                dbeta[block] += (after * _carried(u_c[: len(after)], s, th, dynamics)).sum(0)
            if dtheta is not None:
                q = torch.zeros_like(u_c) if g is None else g[rows, block].to(u.dtype, copy=True)
                # r is the gradient of what a spike changes: c_t, or the next membrane if it subtracts late.
                r = after if dynamics.subtracts_late else after * b
                if not dynamics.detach_reset and dynamics.reset != "none":
                    q[: len(after)].addcmul_(r, u_c[: len(after)] if dynamics.reset == "zero" else th, value=-1)
                dtheta[block] -= (phi * q).sum(0)
                if dynamics.reset == "subtract":
                    dtheta[block] -= (s * r).sum(0)
        if dx is not None and not in_place:
            dx[:, block] = d
    return dx, _reduce(dbeta, beta), _reduce(dtheta, theta)


def carry_factor(u: Tensor, phi: Tensor, beta: Tensor, theta: Tensor, dynamics: Dynamics) -> Tensor:
    """Return dd_t / dd_{t+1} = a_t + kappa b_t phi_t, of the shape of ``u`` or of beta."""
    if dynamics.reset == "zero":
        factor = torch.empty_like(u)
        (torch.lt if dynamics.fire_at_threshold else torch.le)(u, theta, out=factor)
        return (factor if dynamics.detach_reset else factor.addcmul_(u, phi, value=-1)).mul_(beta)
    if dynamics.reset == "none" or dynamics.detach_reset:
        return beta
    return torch.addcmul(beta, phi, theta if dynamics.reset_delay else beta * theta, value=-1)


def _fired(u: Tensor, theta: Tensor, dynamics: Dynamics) -> Tensor:
    return (torch.ge if dynamics.fire_at_threshold else torch.gt)(u, theta, out=torch.empty_like(u))


def _carried(u: Tensor, s: Tensor, theta: Tensor, dynamics: Dynamics) -> Tensor:
    if dynamics.reset == "zero":
        return (1 - s) * u
    if dynamics.reset == "subtract" and not dynamics.reset_delay:
        return u - s * theta
    return u


def _reduce(total: Tensor | None, like: Tensor) -> Tensor | None:
    return total if total is None or like.dim() else total.sum()


def _differentiable_scan(
    g: Tensor | None,
    h: Tensor | None,
    u: Tensor,
    beta: Tensor,
    theta: Tensor,
    dynamics: Dynamics,
    rule: Surrogate,
    need: tuple[bool, bool, bool],
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Do :func:`_scan` in operations that autograd follows, for gradients of gradients.

    Every dependence is differentiated: on the upstream gradient, on u, and on beta and theta. Where the second
    derivative of the surrogate is needed and does not exist, that backward pass raises ``RuntimeError``.
    The result is the Jacobian of a surrogate gradient field: not a Hessian, not symmetric.
    """
    zero, subtract = dynamics.reset == "zero", dynamics.reset == "subtract"
    later: Tensor | None = None
    rows: list[Tensor] = []
    dbeta, dtheta = torch.zeros_like(u[0]), torch.zeros_like(u[0])
    upstream = [None] * len(u) if g is None else g.to(u.dtype).unbind(0)
    outside = [None] * len(u) if h is None else h.unbind(0)
    for u_t, g_t, h_t in zip(reversed(u.unbind(0)), reversed(upstream), reversed(outside), strict=True):
        z = u_t - theta
        phi = slope(z, rule)
        s = spike(z, rule, dynamics.fire_at_threshold)
        s = s.detach() if dynamics.detach_reset else s
        q = torch.zeros_like(u_t) if g_t is None else g_t
        through = torch.zeros_like(u_t)
        if later is not None:
            r = beta * later
            through = (1 - s) * r if zero else r
            if not dynamics.detach_reset and dynamics.reset != "none":
                q = q - (u_t * r if zero else theta * (later if dynamics.reset_delay else r))
            dbeta = dbeta + later * _carried(u_t, s, theta, dynamics)
            if subtract:
                dtheta = dtheta - s * (later if dynamics.reset_delay else r)
        dtheta = dtheta - phi * q
        later = phi * q + through
        later = later if h_t is None else later + h_t
        rows.append(later)
    return (
        torch.stack(rows[::-1]).to(dtype) if need[0] else None,
        _reduce(dbeta, beta) if need[1] else None,
        _reduce(dtheta, theta) if need[2] else None,
    )
