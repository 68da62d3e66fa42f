"""Functions of rows compiled by Inductor, called at the price of their arithmetic.

What ``torch.compile`` returns looks at every argument again on every call (guards, the runtime of autograd, one tensor
for every row), which costs a small layer more than its neurons do. Once a function of a fixed kind is compiled, there is
nothing to look at: so the kernel that Inductor made is called by the addresses of its arguments. It is reached through
interfaces of torch that are not public; where they are missing, or where the kernel's results on an example differ from
those of ``torch.compile`` in a single bit, calls go on through ``torch.compile``.
"""

from __future__ import annotations

import ctypes
import logging
import operator
import time
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

_SIZES = 65_539, 1_031  # of the examples: the first is enough for many threads, neither is a multiple of a register
_log = logging.getLogger(__name__)


class Kind(NamedTuple):
    """What an argument is: a row (N,), or a single number ()."""

    dtype: torch.dtype
    single: bool = False


class Compiled:
    """A function of rows of N values each; made by compiling it, which takes seconds.

    Args:
        body: Takes one tensor per argument, writes to some of them by ``copy_`` and returns nothing. What is written to
            must not overlap with other arguments.
        kinds: What the arguments are.
        name: What the log calls it.
    """

    def __init__(self, body: Callable[..., None], kinds: Sequence[Kind], name: str) -> None:
        assert isinstance(body, FunctionType)
        started = time.perf_counter()
        # A code object of its own: torch.compile counts the versions of one code object and stops at eight.
        own = FunctionType(
            body.__code__.replace(), body.__globals__, body.__name__, body.__defaults__, body.__closure__
        )
        self._kinds = list(kinds)
        self._made: list[Any] = []  # Inductor's modules
        self._guarded = torch.compile(own, backend=self._backend, fullgraph=True, dynamic=True)
        self._kernel: Callable[..., None] | None = None
        self._pick: Callable[[list[Any]], tuple[Any, ...]]  # of arguments, size and numbers what it takes
        self._numbers: list[Tensor] = []
        with torch.inference_mode(False), torch.no_grad():
            example = self._example(_SIZES[0])
            try:
                self._guarded(*example)
            except Exception:  # noqa: BLE001 - a real fault comes back here
                self._guarded = torch.compile(own, fullgraph=True, dynamic=True)
                self._guarded(*example)
            try:
                self._reach()
            except Exception as error:  # noqa: BLE001 - whatever a private interface may do
                self._kernel = None
                _log.info("A compiled neuron (%s) keeps the guards of torch.compile: %s", name, error)
        self._made.clear()
        _log.info("Compiled a neuron (%s) in %.1f s", name, time.perf_counter() - started)

    @property
    def direct(self) -> bool:
        """Whether calls go straight to the compiled code."""
        return self._kernel is not None

    def __call__(self, size: int, columns: Sequence[int | list[int]]) -> None:
        """Run it in turn on rows of ``size`` values that begin at the addresses of ``columns``, one per argument.

        The caller vouches for memory and kinds. Rows may overlap where neither is written to.

        Args:
            size: N.
            columns: For each argument a list with an address per run, or one address for all of them.

        Raises:
            ValueError: Lists of several lengths.
        """
        count = max(len(column) for column in columns if isinstance(column, list))
        each = [column if isinstance(column, list) else [column] * count for column in columns]
        if any(len(column) != count for column in each):
            raise ValueError(f"columns of several lengths: {sorted({len(column) for column in each})}")
        kernel = self._kernel
        if size == 0:
            return
        if kernel is None:
            for row in zip(*each, strict=True):
                self._guarded(*[_tensor(size, at, kind) for at, kind in zip(row, self._kinds, strict=True)])
            return
        each += [[size] * count, *([t.data_ptr()] * count for t in self._numbers)]
        for arguments in zip(*self._pick(each), strict=True):
            kernel(*arguments)

    def _reach(self) -> None:
        """Find the kernel, and which argument goes where in it."""
        if len(self._made) != 1:
            raise ValueError(f"it was made of {len(self._made)} pieces")
        scope = getattr(self._made[0], "__func__", self._made[0]).__globals__
        kernels = {key: value for key, value in scope.items() if _is_kernel(value)}
        if len(kernels) != 1:
            raise ValueError(f"it was made of {len(kernels)} kernels")
        ((key, kernel),) = kernels.items()
        calls: list[tuple[Any, ...]] = []

        def noted(*args: Any) -> None:
            calls.append(args)
            kernel(*args)

        size = _SIZES[1]
        example = self._example(size)
        twin = [t.clone() for t in example]
        scope[key] = noted
        try:
            self._guarded(*example)
        finally:
            scope[key] = kernel
        if len(self._made) != 1:
            raise ValueError("it is for one size only")
        if len(calls) != 1:
            raise ValueError(f"its kernel was called {len(calls)} times")
        # torch.compile hands over the floats of a body as tensors without dimensions.
        places = {t.data_ptr(): i for i, t in enumerate(example)}
        self._numbers = [a for a in calls[0] if isinstance(a, Tensor) and a.dim() == 0 and a.data_ptr() not in places]
        places |= {t.data_ptr(): i for i, t in enumerate(self._numbers, len(example) + 1)}
        order = [_place(a, places, size, len(example)) for a in calls[0]]
        found = ctypes.CDLL(kernel.__self__.__file__)["kernel"]
        found.argtypes = [ctypes.c_void_p if isinstance(a, Tensor) else ctypes.c_int64 for a in calls[0]]
        found.restype = None
        self._kernel, self._pick = found, operator.itemgetter(*order)
        self(size, [[t.data_ptr()] for t in twin])
        if not all(torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
                   for a, b in zip(example, twin, strict=True)):  # fmt: skip
            raise ValueError("its results differ")

    def _example(self, size: int) -> list[Tensor]:
        draw = torch.Generator("cpu").manual_seed(size)
        return [
            torch.rand((() if kind.single else (size,)), generator=draw, device="cpu").to(kind.dtype)
            for kind in self._kinds
        ]

    def _backend(self, graph: Any, examples: list[Any]) -> Any:
        import torch._functorch.config as functorch
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        def inner(graph: Any, examples: Any, **options: Any) -> Any:
            code = compile_fx_inner(graph, examples, **options)
            self._made.append(getattr(code, "current_callable", None))
            return code

        with functorch.patch(enable_autograd_cache=False):  # which hands out old code without calling `inner`
            return compile_fx(graph, examples, inner_compile=inner)


def _is_kernel(value: Any) -> bool:
    return (
        isinstance(value, BuiltinFunctionType)
        and value.__name__ == "kernel"
        and isinstance(value.__self__, ModuleType)
        and value.__self__.__file__ is not None
    )


def _place(value: Any, places: dict[int, int], size: int, size_at: int) -> int:
    """Return which of arguments, size and numbers this is."""
    if isinstance(value, Tensor) and value.data_ptr() in places:
        return places[value.data_ptr()]
    if isinstance(value, Tensor) or value != size:
        raise ValueError(f"it takes {value if not isinstance(value, Tensor) else 'a tensor'} that is no argument")
    return size_at


def _tensor(size: int, address: int, kind: Kind) -> Tensor:
    """Return a tensor over memory of somebody else, whose storage, for all that torch knows, is its own.

    torch.compile would compile anew for a view that begins elsewhere in its storage, and would copy the whole storage
    if views of it are written to.
    """
    count = 1 if kind.single else size
    memory = (ctypes.c_char * (count * kind.dtype.itemsize)).from_address(address)
    row = torch.frombuffer(memory, dtype=kind.dtype)
    return row.view(()) if kind.single else row
