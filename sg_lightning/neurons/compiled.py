"""The neuron compiled by Inductor for the CPU: several time steps in one loop over neurons.

Time is cut into chunks of up to ``_CHUNK`` steps that hand on their state, so that code for one or two lengths serves
any T and compile time does not grow with T; N is dynamic. Inductor contracts no multiply-add on a CPU unless told
to, so spikes are those of the reference bit for bit.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sg_lightning.neurons import eager
from sg_lightning.neurons.base import Dynamics
from sg_lightning.neurons.eager import Gradients, Needs, carried, reduced
from sg_lightning.neurons.inductor import Compiled
from sg_lightning.neurons.surrogates import Surrogate, of_code

_CHUNK = 16  # steps: longer bodies compile for longer and do not fit the registers
_log = logging.getLogger(__name__)

broken = ""  # why compiled code cannot be used in this process, if so


def forward(x: Tensor, beta: Tensor, theta: Tensor, dynamics: Dynamics, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Do :func:`eager.forward <sg_lightning.neurons.eager.forward>` in compiled code."""
    steps, size = x.shape
    constant = x.stride(0) == 0 and steps > 1
    x = x[:1].contiguous() if constant else x.contiguous()
    kind = (dynamics.code, keep, constant, *_kind(x, beta, theta))
    c = s_last = beta.new_zeros(size)
    spikes = x.new_empty((steps, size))
    membranes = x.new_empty((steps, size), dtype=beta.dtype) if keep else None
    spike_rows = list(spikes.unbind(0))
    membrane_rows = None if membranes is None else list(membranes.unbind(0))
    for rows in _chunks(steps):
        out = spike_rows[rows], None if membrane_rows is None else membrane_rows[rows]
        run = _forward(rows.stop - rows.start, *kind)
        c, s_last = run(size, x if constant else x[rows], c, s_last, beta, theta, *out)
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
    """Do :func:`eager.backward <sg_lightning.neurons.eager.backward>` in compiled code."""
    steps, size = u.shape
    u = u.contiguous()
    g, h = (None if t is None else t.contiguous() for t in (g, h))
    kind = (
        dynamics.code,
        rule.code,
        need,
        None if g is None else g.dtype,
        h is not None,
        dtype,
        *_kind(u, beta, theta),
    )
    later = u.new_zeros(size)
    dx = u.new_empty((steps, size), dtype=dtype) if need[0] else None
    totals = [u.new_zeros(size) if n else None for n in need[1:]]
    dx_rows = None if dx is None else list(dx.unbind(0))
    for rows in reversed(_chunks(steps)):
        parts = (None if t is None else t[rows] for t in (g, h, u))
        run = _backward(rows.stop - rows.start, *kind)
        later, *sums = run(size, *parts, later, beta, theta, None if dx_rows is None else dx_rows[rows])
        for total, piece in zip(totals, sums, strict=True):
            if total is not None:
                total += piece
    return dx, reduced(totals[0], beta), reduced(totals[1], theta)


class Cautious:
    """The same two functions for those who did not ask for compiled code: where it fails, eager code does the work."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor | None]:
        """Try compiled code."""
        return _tried(forward, eager.forward, *args)

    @staticmethod
    def backward(*args: Any) -> Gradients:
        """Try compiled code."""
        return _tried(backward, eager.backward, *args)


def _tried(fast: Callable[..., Any], safe: Callable[..., Any], *args: Any) -> Any:
    global broken
    try:
        return fast(*args)
    except (RuntimeError, OSError, ImportError) as error:  # torch's compile errors are RuntimeErrors
        broken = f"compiling failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        _log.warning("Neurons go on in eager code, since %s", broken)
        return safe(*args)


def _chunks(steps: int) -> list[slice]:
    """Cut time into chunks of at most two lengths, of one if a divisor of ``steps`` allows."""
    length = next((n for n in range(_CHUNK, max(_CHUNK // 4, 1), -1) if steps % n == 0), None)
    number = -(-steps // (length or _CHUNK))
    ends = [round(steps * i / number) for i in range(number + 1)]
    return [slice(low, high) for low, high in itertools.pairwise(ends)]


def _kind(like: Tensor, beta: Tensor, theta: Tensor) -> tuple[Any, ...]:
    # Inductor writes the number of threads into the code.
    return like.dtype, beta.dtype, beta.dim(), theta.dim(), torch.get_num_threads()


@functools.cache
def _forward(steps: int, code: str, keep: bool, constant: bool, *kind: Any) -> Compiled:
    dynamics = Dynamics.of_code(code)
    fires = torch.ge if dynamics.fire_at_threshold else torch.gt

    def body(
        x: Tensor,
        c: Tensor,
        s: Tensor,
        beta: Tensor,
        theta: Tensor,
        s_rows: list[Tensor],
        u_rows: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        for t in range(steps):
            u = beta * c + x[0 if constant else t]
            if dynamics.subtracts_late:
                u = u - s * theta
            s = fires(u, theta).to(u.dtype)
            c = carried(u, s, theta, dynamics)
            s_rows[t].copy_(s)
            if u_rows is not None:
                u_rows[t].copy_(u)
        return c, s

    return Compiled(body, f"forward, {steps} steps, {code}")


@functools.cache
def _backward(steps: int, code: str, rule_code: str, need: Needs, *kind: Any) -> Compiled:
    dynamics, rule = Dynamics.of_code(code), of_code(rule_code)
    zero, late, subtract = dynamics.reset == "zero", dynamics.subtracts_late, dynamics.reset == "subtract"
    attached = not dynamics.detach_reset and dynamics.reset != "none"
    fires = torch.ge if dynamics.fire_at_threshold else torch.gt

    def body(
        g: Tensor | None,
        h: Tensor | None,
        u: Tensor,
        later: Tensor,
        beta: Tensor,
        theta: Tensor,
        d_rows: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        dbeta, dtheta = torch.zeros_like(later), torch.zeros_like(later)
        for t in range(steps - 1, -1, -1):
            u_t = u[t]
            z = u_t - theta
            phi = rule.derivative(z)
            s = fires(u_t, theta).to(u_t.dtype)
            r = later if late else beta * later  # the gradient of what a spike changes
            q = torch.zeros_like(later) if g is None else g[t].to(u_t.dtype)
            if attached:
                q = q - r * (u_t if zero else theta)
            dbeta = dbeta + later * carried(u_t, s, theta, dynamics)
            dtheta = dtheta - phi * q
            if subtract:
                dtheta = dtheta - s * r
            d = phi * q + ((1 - s) * r if zero else beta * later)
            later = d if h is None else d + h[t]
            if d_rows is not None:
                d_rows[t].copy_(later)
        return later, dbeta if need[1] else None, dtheta if need[2] else None

    return Compiled(body, f"backward, {steps} steps, {code}, {rule}")
