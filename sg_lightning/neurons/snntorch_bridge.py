"""Bridge to snnTorch: make any of its networks a stateless function x -> logits."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd import Function

from sg_lightning.neurons.base import SpikingNeuron
from sg_lightning.neurons.reference import slope
from sg_lightning.neurons.rules import BackwardRule, GivenSlopes, SlopeRule
from sg_lightning.neurons.surrogates import Surrogate

SpikeReadout = Literal["mean_spikes", "sum_spikes", "last_membrane", "max_membrane"]


_STATE = ("mem", "spk", "syn", "syn_exc", "syn_inh")  # buffers of snnTorch's neurons that change from step to step


def from_snntorch(
    net: nn.Module,
    *,
    time_steps: int | None = None,
    time_dim: int | None = None,
    readout: SpikeReadout = "mean_spikes",
    batch_dim: int = 0,
) -> SnnTorchNetwork:
    """Wrap a snnTorch network so that ``forward(x)`` gives logits and leaves nothing behind.

    The hidden state of every snnTorch neuron is cleared before and after each forward pass, also after an exception,
    so that a second call gives the same logits and the same input gradient. The network is wrapped, not copied:
    its parameters stay the same objects.

    Args:
        net: Any module with snnTorch neurons: an ``nn.Sequential``, with ``init_hidden=True`` or with layers that
            return (spikes, membrane), nested or not; a module of your own that does one time step per call and
            returns spikes or (spikes, ..., membrane); or one that runs its own time loop and returns recordings.
        time_steps: How often the net is called with the same ``x``; ``None`` means that it runs its own time loop
            and returns recordings (T, B, K), as a tensor or a list over time, or (spikes, ..., membrane) of those.
        time_dim: Axis of ``x`` that holds time (1 for frames (B, T, C, H, W)); the net is then called once per
            step with that step's slice, and ``time_steps`` is not needed.
        readout: Logits from the output neurons: mean or sum of their spikes, or last or largest membrane.
        batch_dim: Axis where the net wants the batch in its input; ``x`` itself is always (B, ...).

    Returns:
        A module x (B, ...) -> logits (B, K). Attacks may set its ``attack_rule``: then all snnTorch neurons use that
        surrogate in the backward pass, and the forward pass stays what it is.

    Raises:
        ValueError: No snnTorch neurons in ``net``, an unknown readout, ``time_steps`` below 1 or together with
            ``time_dim``; in the forward pass, outputs of another form than described.
    """
    return SnnTorchNetwork(net, time_steps=time_steps, time_dim=time_dim, readout=readout, batch_dim=batch_dim)


class SnnTorchNetwork(SpikingNeuron):
    """What :func:`from_snntorch` returns; the arguments are explained there.

    It counts as one spiking neuron for attacks: ``attack_rule`` reaches all snnTorch neurons inside.
    """

    slopes_only: ClassVar[bool] = True  # snnTorch's own loop over time does the rest

    def __init__(
        self,
        net: nn.Module,
        *,
        time_steps: int | None = None,
        time_dim: int | None = None,
        readout: SpikeReadout = "mean_spikes",
        batch_dim: int = 0,
    ) -> None:
        super().__init__()
        if readout not in get_args(SpikeReadout):
            raise ValueError(f"unknown readout {readout!r}; choose one of {', '.join(get_args(SpikeReadout))}")
        check_time_steps(time_steps, allow_none=True)
        if time_steps is not None and time_dim is not None:
            raise ValueError("give time_steps (x is repeated) or time_dim (x holds the steps), not both")
        if time_dim is not None and time_dim < 1:
            raise ValueError(f"time_dim must be 1 or more, since axis 0 of x is the batch; got {time_dim}")
        if not isinstance(net, nn.Module) or not _neurons(net):
            raise ValueError(
                f"{type(net).__name__} contains no snnTorch neurons, so there is nothing to bridge; "
                "plain PyTorch models need no bridge"
            )
        self.net = net
        self.time_steps, self.time_dim = time_steps, time_dim
        self.readout, self.batch_dim = readout, batch_dim

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of ``x`` (B, ...)."""
        if not isinstance(x, Tensor) or x.dim() < 1 or not x.is_floating_point():
            got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"the network needs a floating-point tensor (B, ...), got {got}")
        neurons = _neurons(self.net)
        with _stateless(neurons), _gradient_rule(neurons, self.attack_rule):
            spikes, membrane = self._recordings(x)
            recorded = spikes if self.readout.endswith("spikes") else membrane
            if recorded is None:
                raise ValueError(
                    f"readout={self.readout!r} needs the membrane, but the net returns only spikes; build its last "
                    "neuron with output=True, or use readout='mean_spikes'"
                )
            return self._read(recorded)

    def _read(self, recorded: Tensor) -> Tensor:
        if self.readout == "mean_spikes":
            return recorded.mean(0)
        if self.readout == "sum_spikes":
            return recorded.sum(0)
        return recorded[-1] if self.readout == "last_membrane" else recorded.amax(0)

    def _recordings(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        batch = x.shape[0]
        if self.time_steps is None and self.time_dim is None:
            return _split(self.net(x.movedim(0, self.batch_dim)), 3, f"(T, {batch}, K)", batch)
        if self.time_dim is not None:
            if self.time_dim >= x.dim():
                raise ValueError(f"time_dim={self.time_dim} but x has shape {tuple(x.shape)}")
            frames: Sequence[Tensor] = x.unbind(self.time_dim)
        else:
            frames = [x] * (self.time_steps or 1)
        steps = [_split(_step(self.net, f.movedim(0, self.batch_dim)), 2, f"({batch}, K)", batch) for f in frames]
        spikes = torch.stack([s for s, _ in steps])
        membranes = [m for _, m in steps if m is not None]
        return spikes, torch.stack(membranes) if membranes else None

    def extra_repr(self) -> str:  # noqa: D102
        return f"time_steps={self.time_steps}, time_dim={self.time_dim}, readout={self.readout!r}"


def check_time_steps(time_steps: int | None, *, allow_none: bool) -> None:
    """Refuse anything but a whole number above 0 (or ``None``)."""
    if time_steps is None and allow_none:
        return
    if isinstance(time_steps, bool) or not isinstance(time_steps, int) or time_steps < 1:
        raise ValueError(f"time_steps must be a whole number above 0, got {time_steps!r}")


def _neurons(net: nn.Module) -> list[nn.Module]:
    snn = importlib.import_module("snntorch")
    kinds = (snn.SpikingNeuron, snn.LeakyParallel)
    return [module for module in net.modules() if isinstance(module, kinds)]


@contextmanager
def _stateless(neurons: list[nn.Module]) -> Iterator[None]:
    _clear(neurons)
    try:
        yield
    finally:
        _clear(neurons)


def _clear(neurons: list[nn.Module]) -> None:
    """Put every neuron back to where its constructor left it: an empty state, and no reset signal."""
    with torch.inference_mode(False):  # else the empty state would be an inference tensor for ever
        for neuron in neurons:
            for name in _STATE:
                old = neuron._buffers.get(name)
                if old is not None:
                    neuron._buffers[name] = torch.zeros(0, dtype=old.dtype, device=old.device)
            neuron.__dict__.pop("reset", None)


class _Swapped(Function):
    """The network's own spike forward, another surrogate backward."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, own: Any, rule: Surrogate) -> Tensor:
        ctx.save_for_backward(z)
        ctx.rule = rule
        return own(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (z,) = ctx.saved_tensors
        return (grad * slope(z, ctx.rule)).to(z.dtype), None, None


@contextmanager
def _gradient_rule(neurons: list[nn.Module], rule: Surrogate | BackwardRule | None) -> Iterator[None]:
    if rule is None:
        yield
        return

    # Through __dict__, which is looked up first, so that a surrogate that is a sub-module can be swapped too.
    before = [{name: neuron.__dict__.get(name) for name in ("spike_grad", "mem_reset")} for neuron in neurons]
    try:
        for neuron in neurons:
            if isinstance(rule, Surrogate):
                neuron.__dict__["spike_grad"] = partial(_fire_with, neuron.spike_grad, rule)
            else:
                _follow(neuron, rule)
        yield
    finally:
        for neuron, held in zip(neurons, before, strict=True):
            for name, value in held.items():
                neuron.__dict__.pop(name, None)
                if value is not None:
                    neuron.__dict__[name] = value


def _fire_with(own: Any, rule: Surrogate, z: Tensor) -> Tensor:
    return _Swapped.apply(z, own, rule)


def _follow(neuron: nn.Module, rule: BackwardRule) -> None:
    """Let a rule give the slope of every step of a neuron."""
    if not isinstance(rule, SlopeRule) or not hasattr(neuron, "mem_reset"):
        raise ValueError(
            f"{type(rule).__name__} cannot replace the backward pass of snntorch.{type(neuron).__name__}, whose loop over "
            "time is snnTorch's own; build the network of sg_lightning.neurons.LIF layers (fuse_snntorch does it for "
            "an nn.Sequential of snntorch.Leaky)"
        )
    own: Any = neuron.spike_grad
    own_reset: Any = neuron.mem_reset
    past: list[Tensor] = []

    def fire(z: Tensor) -> Tensor:
        if not z.requires_grad:
            return own(z)
        with torch.no_grad():
            known = GivenSlopes(rule.slope(neuron, z.detach(), past))
        past.append(z.detach())
        return _Swapped.apply(z, own, known)

    def reset(membrane: Tensor) -> Tensor:
        """Ask for the reset, which is detached, without counting it as a time step."""
        neuron.__dict__["spike_grad"] = own
        try:
            return own_reset(membrane)
        finally:
            neuron.__dict__["spike_grad"] = fire

    neuron.__dict__["spike_grad"], neuron.__dict__["mem_reset"] = fire, reset


def _step(module: nn.Module, x: Any) -> Any:
    """Call ``module`` once. In a Sequential, layers that return (spikes, membrane) hand on their spikes."""
    if type(module) is not nn.Sequential:
        return module(x)
    children = list(module)
    for index, child in enumerate(children):
        x = _step(child, x)
        if isinstance(x, tuple) and index < len(children) - 1:
            x = x[0]
    return x


def _split(output: Any, rank: int, form: str, batch: int) -> tuple[Tensor, Tensor | None]:
    """Return spikes and, if there is one, the membrane, from what the net returned."""
    parts = list(output) if isinstance(output, tuple) else [output]
    if rank == 3:
        parts = [torch.stack(list(part)) if isinstance(part, list) else part for part in parts]
    for part in (parts[0], parts[-1]) if parts else (None,):
        if not isinstance(part, Tensor) or part.dim() != rank or part.shape[-2] != batch:
            got = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            cure = (
                "time_steps=None expects a net with its own time loop; for one that does one step per call give "
                "time_steps=... (constant input) or time_dim=... (input with a time axis)"
                if rank == 3
                else "with time_steps or time_dim each call must be one time step; for a net with its own time loop "
                "leave both out"
            )
            raise ValueError(f"the net must return spikes {form} or (spikes, ..., membrane), got {got}: {cure}")
    return parts[0], parts[-1] if len(parts) > 1 else None
