"""The neuron compiled by Inductor for the CPU: one or two time steps in one loop over neurons, from row to row.

Longer bodies are slower: rows of a sequence are often a power of two apart, and more than a few of them at once fit neither
the ways of a cache nor the streams that a processor fetches ahead. The state is the row that was written last, so code for
two lengths serves any T, compile time does not grow with T, and N is dynamic. Inductor contracts no multiply-add on a CPU
unless told to, so spikes are those of the reference bit for bit.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from sg_lightning.neurons import eager
from sg_lightning.neurons.base import Dynamics
from sg_lightning.neurons.eager import Gradients, Needs, carried, reduced
from sg_lightning.neurons.inductor import Compiled, Kind
from sg_lightning.neurons.surrogates import Surrogate, of_code

_STEPS = 2  # of a call
_PLAIN = Tensor, torch.nn.Parameter
_KEPT = 1 << 20  # zeros, per dtype
_rest: dict[torch.dtype, Tensor] = {}
_log = logging.getLogger(__name__)

broken: dict[Hashable, str] = {}  # why ``auto`` stays with eager code, for kinds of neurons that were tried


def forward(
    x: Tensor, beta: Tensor, theta: Tensor, dynamics: Dynamics, keep: bool, *, direct: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Do :func:`eager.forward <sg_lightning.neurons.eager.forward>` in compiled code.

    Raises:
        ValueError: Shapes, types or devices that do not go together.
        RuntimeError: It cannot be compiled, or if ``direct``, its kernel cannot be called by address.
    """
    if not _in_memory(x, beta, theta):
        return eager.forward(x, beta, theta, dynamics, keep)
    steps, size = x.shape
    _check(beta, beta.dtype, (), (size,))
    _check(theta, beta.dtype, (), (size,))
    x, beta, theta = _with_rows(x), beta.contiguous(), theta.contiguous()
    kind = keep, dynamics.code, x.dtype, *_kind(beta, theta)
    spikes = x.new_empty((steps, size))
    membranes = beta.new_empty((steps, size)) if keep else None
    rest, silence = _zeros(size, beta.dtype), _zeros(size, x.dtype)
    states = beta.new_empty((2, size)) if membranes is None else membranes
    x_at, s_at = _addresses(x), _addresses(spikes)
    u_at = _addresses(states) if keep else _in_turn(states, steps)
    numbers = [beta.data_ptr(), theta.data_ptr()]
    u_before, s_before = rest.data_ptr(), silence.data_ptr()
    for length, low, high in _stretches(steps):
        last = slice(low + length - 1, high, length)
        run = _wanted(_forward(length, *kind), direct)
        run(size, [
            [u_before, *u_at[last][:-1]], [s_before, *s_at[last][:-1]], *numbers,
            *_columns(x_at, length, low, high), *_columns(s_at, length, low, high),
            *(_columns(u_at, length, low, high) if keep else [u_at[last]]),
        ])  # fmt: skip
        u_before, s_before = u_at[high - 1], s_at[high - 1]
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
    *,
    direct: bool = False,
) -> Gradients:
    """Do :func:`eager.backward <sg_lightning.neurons.eager.backward>` in compiled code.

    Raises:
        ValueError: Shapes, types or devices that do not go together.
        RuntimeError: It cannot be compiled, or if ``direct``, its kernel cannot be called by address.
    """
    if not _in_memory(g, h, u, beta, theta):
        return eager.backward(g, h, u, beta, theta, dynamics, rule, need, dtype)
    steps, size = u.shape
    for t, *allowed in ((beta, (), (size,)), (theta, (), (size,)), (h, u.shape)):
        _check(t, u.dtype, *allowed)
    _check(g, None if g is None else g.dtype, u.shape)
    u, beta, theta = _with_rows(u), beta.contiguous(), theta.contiguous()
    g, h = (None if t is None else _with_rows(t) for t in (g, h))
    kind = (
        dynamics.code, rule.code, need[1], need[2], None if g is None else g.dtype, h is not None,
        dtype if need[0] else None, *_kind(beta, theta),
    )  # fmt: skip
    dx = u.new_empty((steps, size), dtype=dtype) if need[0] else None
    sums = [u.new_zeros((2, size)) for n in need[1:] if n]  # before a call and after it
    exact = dx is not None and dx.dtype == u.dtype  # then it is what the step before needs
    states = dx if dx is not None and exact else u.new_empty((2, size))
    rest = _zeros(size, u.dtype)
    sequences = [_addresses(t) for t in (u, g, h, dx) if t is not None]
    d_at = _addresses(states) if exact else _in_turn(states, steps)
    sums_at = [_in_turn(t, steps + _STEPS) for t in sums]
    numbers = [beta.data_ptr(), theta.data_ptr()]
    later = rest.data_ptr()
    for length, low, high in reversed(_stretches(steps)):
        columns = [c for at in sequences for c in _columns(at, length, low, high)]
        columns += [at[low + shift : high + shift : length] for at in sums_at for shift in (_STEPS, 0)]
        after = d_at[low:high:length]
        columns += [] if exact else [after]
        run = _wanted(_backward(length, *kind), direct)
        run(size, [[later, *after[:0:-1]], *numbers, *(c[::-1] for c in columns)])
        later = after[0]
    totals = iter(t[0] for t in sums)  # where the call of step 0 writes
    dbeta, dtheta = (next(totals) if n else None for n in need[1:])
    return dx, reduced(dbeta, beta), reduced(dtheta, theta)


class Cautious:
    """The same two functions for those who did not ask for compiled code: where it fails, eager code does the work.

    Args:
        kind: What is noted where it fails.
    """

    def __init__(self, kind: Hashable) -> None:
        self.kind = kind

    def forward(self, *args: Any) -> tuple[Tensor, Tensor | None]:
        """Try compiled code."""
        return self._tried(forward, eager.forward, *args)

    def backward(self, *args: Any) -> Gradients:
        """Try compiled code."""
        return self._tried(backward, eager.backward, *args)

    def _tried(self, fast: Callable[..., Any], safe: Callable[..., Any], *args: Any) -> Any:
        try:
            return fast(*args, direct=True)
        except (RuntimeError, OSError, ImportError) as error:  # torch's compile errors are RuntimeErrors
            why = f"compiled code cannot be used: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            _log.log(
                logging.INFO if broken else logging.WARNING,
                "Neurons (%s) go on in eager code, since %s",
                self.kind,
                why,
            )
            broken[self.kind] = why
            return safe(*args)


def _wanted(run: Compiled, direct: bool) -> Compiled:
    if direct and not run.direct:
        raise RuntimeError("its kernel cannot be called by address, and torch.compile would call it too slowly")
    return run


def _stretches(steps: int) -> list[tuple[int, int, int]]:
    """Cut time into what is done two steps by two, and the step that is left: (length of a call, first, end)."""
    paired = steps - steps % _STEPS
    return [(n, low, high) for n, low, high in ((_STEPS, 0, paired), (1, paired, steps)) if high > low]


def _in_memory(*tensors: Tensor | None) -> bool:
    """Tell whether addresses say all there is: no tracing, no mode, no tensor that is more or less than its memory."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and all(
            type(t) in _PLAIN and not t.is_neg() and not t._is_zerotensor() and not is_functorch_wrapped_tensor(t)
            for t in tensors
            if t is not None
        )
    )


def _check(t: Tensor | None, dtype: torch.dtype | None, *shapes: tuple[int, ...]) -> None:
    """Refuse what would be read wrongly, or beyond its end: addresses tell nothing of a tensor."""
    if t is not None and (t.shape not in shapes or t.dtype != dtype or t.device.type != "cpu"):
        raise ValueError(
            f"a neuron on the CPU needs {dtype} of shape {' or '.join(map(str, map(tuple, shapes)))}, got {t.dtype} of shape "
            f"{tuple(t.shape)} on {t.device}"
        )


def _with_rows(t: Tensor) -> Tensor:
    """Return a matrix whose rows are dense; they may be anywhere, or all the same."""
    return t if t.stride(1) == 1 else t.contiguous()


def _zeros(size: int, dtype: torch.dtype) -> Tensor:
    """Return at least so many zeros, to be read only: making them takes as long as a time step."""
    if size > _KEPT:
        return torch.zeros(size, dtype=dtype, device="cpu")
    row = _rest.get(dtype)
    if row is None or len(row) < size:
        row = _rest[dtype] = torch.zeros(size, dtype=dtype, device="cpu")
    return row


def _addresses(t: Tensor) -> list[int]:
    start, step = t.data_ptr(), t.stride(0) * t.element_size()
    return [start + i * step for i in range(t.shape[0])]


def _in_turn(two: Tensor, steps: int) -> list[int]:
    """Return addresses of two rows that calls take turns in, for every step."""
    at = _addresses(two)
    return [at[t // _STEPS % 2] for t in range(steps)]


def _columns(at: list[int], length: int, low: int, high: int) -> list[list[int]]:
    """Return, for the first step of all calls, for the second, and so on, where their rows are."""
    return [at[low + i : high : length] for i in range(length)]


def _kind(beta: Tensor, theta: Tensor) -> tuple[Any, ...]:
    # Inductor writes the number of threads into the code.
    return beta.dtype, beta.dim() == 0, theta.dim() == 0, torch.get_num_threads()


@functools.cache
def _forward(
    steps: int, keep: bool, code: str, dtype: torch.dtype, compute: torch.dtype, one_beta: bool, one_theta: bool, _: int
) -> Compiled:
    dynamics = Dynamics.of_code(code)
    fires = torch.ge if dynamics.fire_at_threshold else torch.gt

    def body(u: Tensor, s: Tensor, beta: Tensor, theta: Tensor, *rows: Tensor) -> None:
        # At rest nothing is left of a spike, were there one; so where the reset is to zero u alone tells it.
        s = fires(u, theta).to(u.dtype) if dynamics.reset == "zero" else s.to(u.dtype)
        for t in range(steps):
            c = carried(u, s, theta, dynamics)
            u = beta * c + rows[t]
            if dynamics.subtracts_late:
                u = u - s * theta
            s = fires(u, theta).to(u.dtype)
            rows[steps + t].copy_(s)
            if keep:
                rows[2 * steps + t].copy_(u)
        if not keep:
            rows[-1].copy_(u)

    return Compiled(
        body,
        [Kind(compute), Kind(dtype), Kind(compute, one_beta), Kind(compute, one_theta)]
        + [Kind(dtype)] * 2 * steps + [Kind(compute)] * (steps if keep else 1),
        f"forward, {steps} steps, {code}",
    )  # fmt: skip


@functools.cache
def _backward(
    steps: int,
    code: str,
    rule_code: str,
    need_beta: bool,
    need_theta: bool,
    g_dtype: torch.dtype | None,
    has_h: bool,
    dx_dtype: torch.dtype | None,
    compute: torch.dtype,
    one_beta: bool,
    one_theta: bool,
    _: int,
) -> Compiled:
    dynamics, rule = Dynamics.of_code(code), of_code(rule_code)
    zero, late, subtract = dynamics.reset == "zero", dynamics.subtracts_late, dynamics.reset == "subtract"
    attached = not dynamics.detach_reset and dynamics.reset != "none"
    fires = torch.ge if dynamics.fire_at_threshold else torch.gt
    sequences = {"u": compute, "g": g_dtype, "h": compute if has_h else None, "dx": dx_dtype}
    kinds = [Kind(dtype) for dtype in sequences.values() if dtype is not None for _ in range(steps)]
    kinds += [Kind(compute)] * (2 * need_beta + 2 * need_theta + (dx_dtype != compute))

    def body(later: Tensor, beta: Tensor, theta: Tensor, *rows: Tensor) -> None:
        left = iter(rows)
        u, g, h, dx = ([next(left) for _ in range(steps)] if d is not None else None for d in sequences.values())
        dbeta, dbeta_out = (next(left), next(left)) if need_beta else (torch.zeros_like(later), None)
        dtheta, dtheta_out = (next(left), next(left)) if need_theta else (torch.zeros_like(later), None)
        assert u is not None
        for t in range(steps - 1, -1, -1):
            z = u[t] - theta
            phi = rule.derivative(z)
            s = fires(u[t], theta).to(z.dtype)
            r = later if late else beta * later  # the gradient of what a spike changes
            q = torch.zeros_like(later) if g is None else g[t].to(z.dtype)
            if attached:
                q = q - r * (u[t] if zero else theta)
            dbeta = dbeta + later * carried(u[t], s, theta, dynamics)
            dtheta = dtheta - phi * q
            if subtract:
                dtheta = dtheta - s * r
            later = phi * q + ((1 - s) * r if zero else beta * later)
            if h is not None:
                later = later + h[t]
            if dx is not None:
                dx[t].copy_(later)
        if dbeta_out is not None:
            dbeta_out.copy_(dbeta)
        if dtheta_out is not None:
            dtheta_out.copy_(dtheta)
        if dx_dtype != compute:
            next(left).copy_(later)

    return Compiled(
        body,
        [Kind(compute), Kind(compute, one_beta), Kind(compute, one_theta), *kinds],
        f"backward, {steps} steps, {code}, {rule}",
    )
