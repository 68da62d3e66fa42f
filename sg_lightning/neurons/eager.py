"""The neuron in plain torch operations over blocks: spikes and membranes, the closed-form backward, and its backward.

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
so that a block's rows stay in the cache, rows are written in place, and masks are floats: bool tensors are several
times slower there. All functions take matrices (T, N), and beta and theta as scalars or vectors (N,).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sg_lightning.neurons.base import Dynamics
from sg_lightning.neurons.surrogates import Surrogate

Needs = tuple[bool, bool, bool]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

_CPU_BLOCK = 32_768  # neurons per thread: a time step's rows stay in the cache
_CHUNK = 131_072  # elements, time steps times neurons: what the reverse scan prepares at once


def forward(x: Tensor, beta: Tensor, theta: Tensor, dynamics: Dynamics, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Return spikes in the dtype of ``x``, and membranes in that of ``beta`` if they are to be kept."""
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
    """Return the gradients of input (in ``dtype``), beta and theta that are needed.

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
        chunk = max(1, _CHUNK * torch.get_num_threads() // max(d.shape[1], 1)) if u.device.type == "cpu" else steps
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
            s = fired(u_c, th, dynamics)[: len(after)] if dbeta is not None or dtheta is not None else u_c
            if dbeta is not None:
                dbeta[block] += (after * carried(u_c[: len(after)], s, th, dynamics)).sum(0)
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
    return dx, reduced(dbeta, beta), reduced(dtheta, theta)


def double_backward(
    w: Tensor | None,
    v_beta: Tensor | None,
    v_theta: Tensor | None,
    g: Tensor | None,
    h: Tensor | None,
    u: Tensor,
    beta: Tensor,
    theta: Tensor,
    dynamics: Dynamics,
    rule: Surrogate,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of w . dL/dx + v_beta . dL/dbeta + v_theta . dL/dtheta to g, h, u, beta and theta.

    The adjoint of the reverse scan runs forward: with p_t the adjoint of d_t and m_t = phi_t (p_t - v_theta) that of q_t,

        p_t = w_t + a_{t-1} p_{t-1} + kappa b_{t-1} m_{t-1} + v_beta c_{t-1} + v_theta e_{t-1}

    and a, b, c, e and phi pass on what they get to u_t, to s_t (again with slope phi_t), beta and theta. Where phi has
    no derivative, its share is left out: the caller must see to it that nobody gets that result.
    """
    d, _, _ = backward(g, h, u, beta, theta, dynamics, rule, (True, False, False), u.dtype)
    assert d is not None
    zero, late = dynamics.reset == "zero", dynamics.subtracts_late
    kappa = 0.0 if dynamics.detach_reset or dynamics.reset == "none" else 1.0
    nothing = torch.zeros_like(u[0])
    v_b, v_th = (nothing if v is None else v for v in (v_beta, v_theta))
    dg, du, dh = torch.empty_like(u), torch.empty_like(u), torch.empty_like(u)
    dbeta, dtheta = torch.zeros_like(nothing), torch.zeros_like(nothing)
    incoming = nothing  # what p_t gets from the step before
    for t, u_t in enumerate(u.unbind(0)):
        later = d[t + 1] if t + 1 < len(u) else nothing
        z = u_t - theta
        phi, s = rule.derivative(z), fired(u_t, theta, dynamics)
        through = beta * (1 - s) if zero else beta
        push = -beta * u_t if zero else (-theta if late else -beta * theta)
        q = nothing if g is None else g[t].to(u.dtype)
        q = q + kappa * push * later
        p = incoming if w is None else incoming + w[t]
        m = phi * (p - v_th)
        dg[t], dh[t] = m, p
        # The shares of a_t, b_t, c_t and e_t.
        to_u = later * v_b * (1 - s) if zero else later * v_b
        to_s = nothing
        dbeta += later * p * (1 - s) if zero else later * p
        if zero:
            to_u = to_u - kappa * beta * later * m
            to_s = -beta * later * p - u_t * later * v_b
            dbeta -= kappa * u_t * later * m
        elif late:
            to_s = -later * v_th
            dtheta -= kappa * later * m
        elif dynamics.reset == "subtract":
            to_s = -theta * later * v_b - beta * later * v_th
            dbeta -= kappa * theta * later * m + s * later * v_th
            dtheta -= kappa * beta * later * m + s * later * v_b
        bent = rule.second_derivative(z) * q * (p - v_th) if rule.smooth else nothing
        bent = bent if dynamics.detach_reset else bent + phi * to_s
        du[t] = to_u + bent
        dtheta -= bent
        incoming = through * p + kappa * push * m + v_b * carried(u_t, s, theta, dynamics)
        if dynamics.reset == "subtract":
            incoming = incoming - v_th * (s if late else beta * s)
    to_beta, to_theta = reduced(dbeta, beta), reduced(dtheta, theta)
    assert to_beta is not None
    assert to_theta is not None
    return dg, dh, du, to_beta, to_theta


def carry_factor(u: Tensor, phi: Tensor, beta: Tensor, theta: Tensor, dynamics: Dynamics) -> Tensor:
    """Return dd_t / dd_{t+1} = a_t + kappa b_t phi_t, of the shape of ``u`` or of beta."""
    if dynamics.reset == "zero":
        factor = torch.empty_like(u)
        (torch.lt if dynamics.fire_at_threshold else torch.le)(u, theta, out=factor)
        return (factor if dynamics.detach_reset else factor.addcmul_(u, phi, value=-1)).mul_(beta)
    if dynamics.reset == "none" or dynamics.detach_reset:
        return beta
    return torch.addcmul(beta, phi, theta if dynamics.reset_delay else beta * theta, value=-1)


def fired(u: Tensor, theta: Tensor, dynamics: Dynamics) -> Tensor:
    """Return the spikes of membranes ``u``, as floats."""
    return (torch.ge if dynamics.fire_at_threshold else torch.gt)(u, theta, out=torch.empty_like(u))


def carried(u: Tensor, s: Tensor, theta: Tensor, dynamics: Dynamics) -> Tensor:
    """Return c, what membranes ``u`` with spikes ``s`` carry to the next step."""
    if dynamics.reset == "zero":
        return (1 - s) * u
    if dynamics.reset == "subtract" and not dynamics.reset_delay:
        return u - s * theta
    return u


def reduced(total: Tensor | None, like: Tensor) -> Tensor | None:
    """Return the sum over neurons of a gradient per neuron, if the parameter is a scalar."""
    return total if total is None or like.dim() else total.sum()


def _blocks(size: int, device: torch.device) -> Iterator[slice]:
    step = _CPU_BLOCK * torch.get_num_threads() if device.type == "cpu" else max(size, 1)
    return (slice(low, min(low + step, size)) for low in range(0, size, step))


def _part(p: Tensor, block: slice) -> Tensor:
    return p[block] if p.dim() else p
