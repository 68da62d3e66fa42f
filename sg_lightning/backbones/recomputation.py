"""Activations that a backward pass computes again instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils.checkpoint import checkpoint

from sg_lightning.neurons import SpikingNeuron

Recompute = Literal["norms", "blocks"] | int


def segments(
    layers: Sequence[nn.Module], what: Literal["norms", "blocks"]
) -> Iterator[tuple[Sequence[nn.Module], bool]]:
    """Cut layers into runs, and say of each whether its activations are computed again.

    Args:
        layers: Layers in order.
        what: ``"norms"``: a norm and the neuron that follows it. ``"blocks"``: all up to and with the next neuron.
    """
    start = 0
    for place, layer in enumerate(layers):
        if not isinstance(layer, SpikingNeuron):
            continue
        first = start if what == "blocks" else place
        if what == "norms":
            while first > start and isinstance(layers[first - 1], _NormBase):
                first -= 1
        if first > start:
            yield layers[start:first], False
        yield (
            layers[first : place + 1],
            first < place,
        )  # a neuron by itself would keep its input instead of its membrane
        start = place + 1
    if start < len(layers):
        yield layers[start:], False


def again(run: Callable[..., Any], layers: Sequence[nn.Module], *x: Tensor | None) -> Any:
    """Return ``run(*x)``, of which only ``x`` is kept; the backward pass runs it once more, with the same random numbers."""
    if not torch.is_grad_enabled():
        return run(*x)
    if torch.compiler.is_compiling():  # which tells a norm's statistics from what can be computed again
        return checkpoint(run, *x, use_reentrant=False)
    return checkpoint(run, *x, use_reentrant=False, context_fn=lambda: (nullcontext(), _Repeated(layers)))


def in_pieces(
    run: Callable[..., Any], layers: Sequence[nn.Module], x: Tensor, steps: int, states: Sequence[Tensor | None]
) -> Tensor:
    """Run layers over a sequence piece by piece; the backward pass goes through the pieces again, from the last.

    Args:
        run: From a piece (T', B, ...) and states to outputs and new states.
        layers: The layers that it runs.
        x: The sequence (T, B, ...).
        steps: Largest T' of a piece.
        states: The states at the start.
    """
    outputs = []
    for piece in x.split(steps):
        output, *states = again(run, layers, piece, *states)
        outputs.append(output)
    return torch.cat(outputs)


def refuse_pieces(layers: Sequence[nn.Module]) -> None:
    """Raise ``ValueError`` for layers that cannot run piece by piece."""
    for part in (inner for layer in layers for inner in layer.modules()):
        if isinstance(part, _BatchNorm):
            raise ValueError(  # noqa: TRY004 - of the right type, but what it computes does not fit
                f"{type(part).__name__} normalises by the statistics of all steps, so the network cannot run piece by piece; "
                "recompute 'norms' or 'blocks' instead"
            )
        if isinstance(part, SpikingNeuron) and not hasattr(part, "forward_state"):
            raise ValueError(
                f"{type(part).__name__} cannot continue from a state, so the network cannot run piece by piece; recompute "
                "'blocks' instead"
            )


class _Repeated:
    """While layers run again: the modes of the first time, and running statistics in copies, which are dropped.

    It is entered once per backward pass, of which a graph may have several.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._modes = {part: part.training for layer in layers for part in layer.modules()}
        self._now: dict[nn.Module, tuple[bool, dict[str, Tensor | None]]] = {}

    def __enter__(self) -> None:
        self._now = {part: (part.training, dict(part._buffers)) for part in self._modes}
        for part, training in self._modes.items():
            part.training = training
            if isinstance(part, _NormBase) and training:
                part._buffers.update({name: None if b is None else b.clone() for name, b in part._buffers.items()})

    def __exit__(self, *_: object) -> None:
        for part, (training, buffers) in self._now.items():
            part.training = training
            part._buffers.update(buffers)
        self._now = {}
