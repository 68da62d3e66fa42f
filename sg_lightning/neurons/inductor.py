"""Functions compiled by Inductor, called at the price of their arithmetic.

What ``torch.compile`` returns looks at every argument again on every call (guards, the runtime of autograd), which costs
a small layer more than its neurons do. Once a function of a fixed kind is compiled, there is nothing to look at: so
the code that Inductor made is kept and called directly. It is reached through an interface of torch that is not public;
the first call is therefore run both ways, and where the interface is missing or the results differ in a single bit,
calls go on through ``torch.compile``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

Argument: TypeAlias = "Tensor | list[Tensor] | None"
_PART = 65_536  # neurons of the first call, which is made in copies: enough for many threads, little memory
_log = logging.getLogger(__name__)


class Compiled:
    """A function of tensors and lists of tensors (T rows each) that returns a tuple of tensors or None.

    Inputs are not changed, except for the tensors of the lists, which are written to. Sizes may be those of the
    first call or, where they were ``size`` then, the ``size`` of a call. Called without gradients only.

    Args:
        body: The function.
        name: What the log calls it.
    """

    def __init__(self, body: Callable[..., tuple[Tensor | None, ...]], name: str) -> None:
        assert isinstance(body, FunctionType)
        # A code object of its own: torch.compile counts the versions of one code object and stops at eight.
        own = FunctionType(
            body.__code__.replace(), body.__globals__, body.__name__, body.__defaults__, body.__closure__
        )
        self._name, self._own = name, own
        self._made: list[tuple[Callable[[list[Any]], Any], list[Any]]] = []  # Inductor's code, its first inputs
        self._guarded = torch.compile(own, backend=self._backend, fullgraph=True, dynamic=True)
        self._started = False
        self._code: Callable[[list[Any]], Any] | None = None
        self._inputs: list[int | None] = []  # positions among the flat arguments; None stands for the size
        self._fixed: dict[int, Any] = {}  # inputs that are the same in every call: numbers of the body, other sizes
        self._outputs: list[int | None] = []  # positions among what the code returns; None stands for None

    @property
    def direct(self) -> bool:
        """Whether calls go straight to the compiled code."""
        return self._code is not None

    def __call__(self, size: int, *args: Argument) -> tuple[Any, ...]:
        """Run it."""
        if self._code is None:
            return self._first(size, *args) if not self._started else self._guarded(*map(_alone, args))
        flat = _flat(args)
        inputs = [size if i is None else flat[i] for i in self._inputs]
        for i, value in self._fixed.items():
            inputs[i] = value
        found = self._code(inputs)
        return tuple([None if i is None else found[i] for i in self._outputs])

    def _first(self, size: int, *args: Argument) -> tuple[Any, ...]:
        started = time.perf_counter()
        part = min(size, _PART)
        alone, others = _cut(args, size, part), _cut(args, size, part)
        try:
            found = self._guarded(*alone)
        except Exception:  # noqa: BLE001 - a real fault comes back here
            self._guarded = torch.compile(self._own, fullgraph=True, dynamic=True)
            found = self._guarded(*alone)
        self._started = True
        try:
            self._arrange(part, alone, found)
            again = self(part, *others)
            same = [(a, b) for a, b in zip(found, again, strict=True) if a is not None]
            same += zip(_flat([a for a in alone if isinstance(a, list)]),
                        _flat([a for a in others if isinstance(a, list)]), strict=True)  # fmt: skip
            if not all(_same(a, b) for a, b in same):
                raise ValueError("its results differ")
        except Exception as error:  # noqa: BLE001 - whatever a private interface may do
            self._code = None
            _log.info("A compiled neuron (%s) keeps the guards of torch.compile: %s", self._name, error)
        self._made.clear()
        _log.info("Compiled a neuron (%s) in %.1f s", self._name, time.perf_counter() - started)
        return self(size, *args)

    def _arrange(self, size: int, args: list[Any], found: tuple[Tensor | None, ...]) -> None:
        """Find out which argument goes where in the compiled code."""
        if len(self._made) != 1:
            raise ValueError(f"it was made of {len(self._made)} pieces")
        code, inputs = self._made[0]
        if not any(not isinstance(value, Tensor) and value == size for value in inputs):
            raise ValueError("it is for one size only")
        places = {t.data_ptr(): i for i, t in enumerate(_flat(args))}
        self._inputs, self._fixed = [], {}
        for i, value in enumerate(inputs):
            place = places.get(value.data_ptr()) if isinstance(value, Tensor) else None
            self._inputs.append(place)
            # torch.compile hands over the floats of a body as tensors without dimensions.
            if place is None and (value.dim() == 0 if isinstance(value, Tensor) else value != size):
                self._fixed[i] = value
            elif place is None and isinstance(value, Tensor):
                raise ValueError("it takes a tensor that is no argument")
        outputs = iter(range(len(found)))
        self._outputs = [None if t is None else next(outputs) for t in found]
        self._code = code

    def _backend(self, graph: Any, examples: list[Any]) -> Any:
        import torch._functorch.config as functorch
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        def inner(graph: Any, examples: Any, **options: Any) -> Any:
            code = compile_fx_inner(graph, examples, **options)

            def noted(inputs: list[Any]) -> Any:
                if not self._started:
                    self._made.append((code, list(inputs)))
                return code(inputs)

            noted._boxed_call = True  # type: ignore[attr-defined]  # it may empty the list of its inputs
            return noted

        with functorch.patch(enable_autograd_cache=False):  # which hands out old code without calling `inner`
            return compile_fx(graph, examples, inner_compile=inner)


def _cut(args: Any, size: int, part: int) -> list[Any]:
    """Return copies, of the first ``part`` where there are ``size``, so that all tensors are told apart by their address."""

    def copy(t: Tensor) -> Tensor:
        return t[..., :part].clone() if t.dim() and t.shape[-1] == size else t.clone()

    return [a if a is None else [copy(t) for t in a] if isinstance(a, list) else copy(a) for a in args]


def _flat(args: Any) -> list[Tensor]:
    flat: list[Tensor] = []
    for a in args:
        if isinstance(a, list):
            flat += a
        elif a is not None:
            flat.append(a)
    return flat


def _alone(a: Argument) -> Argument:
    """Return tensors whose storage, for all that torch knows, is their own.

    torch.compile would compile anew for a view that begins elsewhere in its storage, and would copy the whole storage
    if views of it are written to.
    """
    if isinstance(a, list):
        return [from_dlpack(to_dlpack(t)) for t in a]
    return None if a is None else from_dlpack(to_dlpack(a))


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
