"""Which code runs a neuron: who wants what, what the machine offers, and why.

| path | what it is | where |
|---|---|---|
| ``reference`` | a readable loop over time in ordinary autograd | anywhere |
| ``eager`` | blocks of torch operations with a closed-form backward | anywhere |
| ``compiled`` | the same equations compiled by Inductor, two time steps in one loop | CPU with a C++ compiler |
| ``triton`` | one kernel over all time steps per direction | CUDA |

All give the same spikes, bit for bit, and gradients equal up to rounding. ``auto``, the default, takes ``triton`` for
CUDA tensors. On a CPU it begins with ``eager`` and goes on with ``compiled`` when a kind of neuron has had so much work
that compiling, which takes seconds, pays: short runs never wait for a compiler.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections import Counter
from collections.abc import Callable, Hashable
from types import TracebackType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sg_lightning.neurons import eager
from sg_lightning.neurons.base import Dynamics
from sg_lightning.neurons.surrogates import Surrogate

Path = Literal["auto", "reference", "eager", "compiled", "triton"]

VARIABLE = "SG_LIGHTNING_NEURONS"
_PATIENCE = 10_000_000_000  # neurons times steps that eager code does in about the time that compiling takes


class Choice(NamedTuple):
    """A path and the reason for it."""

    path: str
    why: str


def _checked(path: str, source: str) -> str:
    if path not in get_args(Path):
        raise ValueError(f"unknown path {path!r} {source}; choose one of {', '.join(get_args(Path))}")
    return path


_wanted: str = _checked(os.environ.get(VARIABLE, "auto"), f"in the environment variable {VARIABLE}")
_work: Counter[Hashable] = Counter()


def wanted() -> str:
    """Return the path that was asked for: by :class:`use_path`, else by the environment, else ``auto``."""
    return _wanted


class use_path:
    """Choose the path of all neurons, for a block or from now on; the variable ``SG_LIGHTNING_NEURONS`` does the same.

    A backward pass takes the path of its forward pass. ``LIF(backend="reference")`` stays what it is.

    Args:
        path: ``"auto"``, ``"reference"``, ``"eager"``, ``"compiled"`` or ``"triton"``.

    Raises:
        ValueError: An unknown name. A path that the machine does not offer raises when a neuron runs.

    Example:
        >>> with use_path("eager"):
        ...     wanted()
        'eager'
    """

    def __init__(self, path: Path) -> None:
        global _wanted
        self._before = _wanted
        _wanted = _checked(path, "for use_path")

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _wanted
        _wanted = self._before


def choose(path: str, like: Tensor, kind: Hashable) -> Choice:
    """Return the path of a call, and why.

    Args:
        path: What is wanted.
        like: A tensor on the device of the call.
        kind: What compiled code is specialised for.

    Raises:
        RuntimeError: The machine or the device of ``like`` does not offer the path that is wanted.
    """
    device = like.device.type
    if path == "eager":
        return Choice("eager", "asked for")
    if path == "reference":  # the readable loop is not inside the operator
        return Choice("eager", "reference was asked for, but only LIF and RecurrentLIF have it")
    if path == "triton":
        problem = without_triton(device)
        if problem:
            raise RuntimeError(f"the path 'triton' is not possible here: {problem}; use 'auto' or 'eager'")
        return Choice("triton", "asked for")
    if path == "compiled":
        if device != "cpu":
            raise RuntimeError(f"the path 'compiled' is for CPU tensors, got one on {device}; use 'auto' or 'eager'")
        return Choice("compiled", "asked for")
    if device == "cuda":
        problem = without_triton(device)
        return Choice("eager", problem) if problem else Choice("triton", "CUDA tensors")
    if device != "cpu":
        return Choice("eager", f"tensors on {device}")
    return _on_cpu(kind)


def _on_cpu(kind: Hashable) -> Choice:
    from sg_lightning.neurons import compiled

    if kind in compiled.broken:
        return Choice("eager", compiled.broken[kind])
    if torch.are_deterministic_algorithms_enabled():
        return Choice("eager", "deterministic algorithms: a change of path midway would change roundings")
    if not has_compiler():
        return Choice("eager", "no C++ compiler (g++ or clang++, or what the variable CXX names)")
    if _work[kind] < _PATIENCE:
        return Choice("eager", f"too little work so far to compile for it ({_work[kind]:.1e} of {_PATIENCE:.0e})")
    return Choice("compiled", f"much work ({_work[kind]:.1e} neurons times steps so far)")


def forward_kind(x: Tensor, dynamics: Dynamics, keep: bool) -> Hashable:
    """Return what a forward pass is specialised for."""
    return "forward", dynamics.code, x.dtype, keep


def forward_of(path: str, x: Tensor, dynamics: Dynamics, keep: bool) -> Callable[..., Any]:
    """Return the function that runs this forward pass, and count its work."""
    return _module(path, x, forward_kind(x, dynamics, keep)).forward


def backward_of(path: str, u: Tensor, dynamics: Dynamics, rule: Surrogate, dtype: torch.dtype) -> Callable[..., Any]:
    """Return the function that runs this backward pass, and count its work."""
    return _module(path, u, ("backward", dynamics.code, rule.code, dtype)).backward


def _module(path: str, like: Tensor, kind: Hashable) -> Any:
    chosen = choose(path, like, kind).path
    _work[kind] += like.numel()
    if chosen == "compiled":
        from sg_lightning.neurons import compiled

        return compiled if path == "compiled" else compiled.Cautious(kind)
    if chosen == "triton":
        from sg_lightning.neurons import triton_kernels

        return triton_kernels
    return eager


def has_compiler() -> bool:
    """Tell whether there is a C++ compiler."""
    return _found(os.environ.get("CXX"), os.environ.get("PATH"))


@functools.cache
def _found(named: str | None, path: str | None) -> bool:  # looking takes as long as a small layer
    return any(shutil.which(name, path=path) for name in ([named] if named else ["g++", "clang++", "c++", "cl"]))


def without_triton(device: str) -> str:
    """Say why Triton cannot run on a device, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        return f"it runs on CUDA tensors, got one on {device} (TRITON_INTERPRET=1 interprets it, slowly)"
    return ""
