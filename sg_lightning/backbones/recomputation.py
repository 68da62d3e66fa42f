"""Activations that a backward pass computes again instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from sg_lightning.neurons import SpikingNeuron

Recompute = Literal["norms", "blocks"]


def segments(layers: Sequence[nn.Module], what: Recompute) -> Iterator[tuple[Sequence[nn.Module], bool]]:
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


def again(run: Callable[[Tensor], Tensor], layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Return ``run(x)``, of which only ``x`` is kept; the backward pass runs it once more, with the same random numbers."""
    if not torch.is_grad_enabled():
        return run(x)
    if torch.compiler.is_compiling():  # which tells a norm's statistics from what can be computed again
        return checkpoint(run, x, use_reentrant=False)
    return checkpoint(run, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _Repeated(layers)))


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
