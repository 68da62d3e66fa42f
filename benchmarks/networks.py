"""The networks of the speed benchmarks, each in the form of every contestant, with the same weights and function.

A network is a list of layers with a mark where its neurons are. A contestant says how it goes over time and which
neuron stands at the mark. Membranes decay by one half, spikes come above 1, the reset to zero is detached, the surrogate
is the arc tangent with alpha = 2, unless a network says otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sg_lightning.backbones.base import OverTime, initialise, over_time
from sg_lightning.backbones.pooling import AvgPool2
from sg_lightning.neurons import LIF, RecurrentLIF, surrogates, use_path

BETA, ALPHA = 0.5, 2.0


class Mark(nn.Module):
    """Where a neuron goes; ``features`` where its spikes feed back through a linear layer."""

    def __init__(self, features: int | None = None) -> None:
        super().__init__()
        self.feedback = None if features is None else nn.Linear(features, features, bias=False)


@dataclass(frozen=True)
class Network:
    """What is timed.

    Args:
        title: In words.
        layers: Makes the layers.
        shape: Of a sample; with time first where ``constant`` is false.
        steps: T.
        batch: B.
        constant: Whether every step sees the same input (direct coding).
        rate: Share of ones in a binary input; ``None``: uniform values.
        beta: Decay of the membranes.
    """

    title: str
    layers: Callable[[], list[nn.Module]]
    shape: tuple[int, ...]
    steps: int
    batch: int
    constant: bool = True
    rate: float | None = None
    beta: float = BETA

    def inputs(self, batch: int | None = None, steps: int | None = None) -> tuple[Tensor, Tensor]:
        """Return inputs (T, B, ...), a view of (B, ...) where they are constant, and labels."""
        generator = torch.Generator().manual_seed(0)
        batch, steps = batch or self.batch, steps or self.steps
        shape = (batch, *self.shape) if self.constant else (steps, batch, *self.shape)
        x = torch.rand(shape, generator=generator)
        x = x if self.rate is None else (x < self.rate).float()
        y = torch.randint(0, 10, (batch,), generator=generator)
        return x.expand(steps, *x.shape) if self.constant else x, y

    def weights(self) -> nn.ModuleList:
        """Return the layers with weights that make all neurons fire."""
        torch.manual_seed(0)
        layers = nn.ModuleList(self.layers())
        initialise(layers)
        for layer in layers:
            if isinstance(layer, nn.Linear) and len(self.shape) == 1:
                memory = 1 / (1 - self.beta**2)  # sparse spikes and leaky membranes: Rossbroich et al. 2206.10226
                nn.init.normal_(layer.weight, std=1.5 * (0.02 * layer.in_features * memory) ** -0.5)
            elif isinstance(layer, nn.Linear):
                layer.weight.data *= 3  # no batch norm wakes the neurons behind them
        return layers


def _convolutions(plan: str, channels: int, *, bias: bool = True) -> tuple[list[nn.Module], int]:
    layers: list[nn.Module] = []
    for item in plan.split():
        if item == "A":
            layers.append(nn.AvgPool2d(2))
            continue
        layers += [nn.Conv2d(channels, int(item), 3, padding=1, bias=bias), nn.BatchNorm2d(int(item)), Mark()]
        channels = int(item)
    return [*layers, nn.Flatten()], channels


def _vgg(head: int) -> list[nn.Module]:
    layers, channels = _convolutions("64 A 128 256 A 512 512 512 A 512 512", 3)
    hidden = [nn.Linear(channels * 16, head), Mark(), nn.Linear(head, head), Mark()]
    return [*layers, *hidden, nn.Linear(head, 10)]


def _events() -> list[nn.Module]:
    layers, channels = _convolutions("32 A A 64 A 128 A 128 A A", 2)
    return [*layers, nn.Linear(channels * 4, 128), Mark(), nn.Linear(128, 11)]


def _dense(*, recurrent: bool = False) -> list[nn.Module]:
    feedback = 256 if recurrent else None
    return [nn.Linear(700, 256), Mark(feedback), nn.Linear(256, 256), Mark(feedback), nn.Linear(256, 20)]


NETWORKS = {
    "vgg": Network("VGG-11, head 512-512, 32 x 32, direct coding", lambda: _vgg(512), (3, 32, 32), steps=4, batch=4),
    "shd": Network(
        "dense 700-256-256-20, T = 100", _dense, (700,), steps=100, batch=64, constant=False, rate=0.02, beta=0.9
    ),
    "shd-16": Network(
        "dense 700-256-256-20, T = 100", _dense, (700,), steps=100, batch=16, constant=False, rate=0.02, beta=0.9
    ),
    "shd-recurrent": Network(
        "recurrent 700-256-256-20, T = 100", lambda: _dense(recurrent=True), (700,), steps=100, batch=64, constant=False,
        rate=0.02, beta=0.9,
    ),
    "dvs": Network(
        "event net 2-32-64-128-128, 128 x 128, T = 16", _events, (2, 128, 128), steps=16, batch=4, constant=False, rate=0.05,
    ),
    "tiny": Network("tiny dense net, to try the benchmark", lambda: [nn.Linear(20, 16), Mark(), nn.Linear(16, 10)],
                    (20,), steps=6, batch=4, constant=False, rate=0.2),
}  # fmt: skip


class Folded(nn.Module):
    """Ours: layers without memory see time folded into the batch; ``neuron(mark)`` makes the neurons."""

    pool: Callable[[], nn.Module] = AvgPool2

    def __init__(self, layers: nn.ModuleList, neuron: Callable[[Mark], nn.Module]) -> None:
        super().__init__()
        *features, self.head = copy.deepcopy(layers)
        self.features = OverTime(*(
            neuron(layer) if isinstance(layer, Mark) else self.pool() if isinstance(layer, nn.AvgPool2d) else layer
            for layer in features
        ))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of (T, B, ...)."""
        return self.head(self.features(x).mean(0))


def ours(beta: float) -> Callable[[Mark], nn.Module]:
    """Return what makes our neurons."""

    def make(mark: Mark) -> nn.Module:
        options: dict[str, Any] = {"detach_reset": True, "surrogate": surrogates.Atan(ALPHA)}
        if mark.feedback is None:
            return LIF(beta, 1.0, "zero", **options)
        neuron = RecurrentLIF(mark.feedback.in_features, beta, 1.0, "zero", **options)
        neuron.recurrent.load_state_dict(mark.feedback.state_dict())
        return neuron

    return make


class _Sequence(nn.Sequential):
    """Like ours, for neurons of others, which see time."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the sequence (T, B, ...) after the last layer."""
        for layer in self:
            x = layer(x) if isinstance(layer, _Leaky | _LIFNode | _Floor) else over_time(layer, x)
        return x


class _Floor(nn.Module):
    """ReLU over all steps; with feedback the linear layer still has to be gone through step by step."""

    def __init__(self, mark: Mark) -> None:
        super().__init__()
        self.feedback = mark.feedback

    def forward(self, x: Tensor) -> Tensor:
        """Return the rectified sequence."""
        if self.feedback is None:
            # All steps: else a constant input would stay one through all layers.
            return torch.relu(x.contiguous() if x.stride(0) == 0 else x)
        active, sequence = torch.zeros_like(x[0]), []
        for now in x.unbind(0):
            active = torch.relu(now + self.feedback(active)).clamp_max(1.0)
            sequence.append(active)
        return torch.stack(sequence)


class _Sequences(Folded):
    """Like ours, for neurons that are not ours."""

    def __init__(self, layers: nn.ModuleList, neuron: Callable[[Mark], nn.Module]) -> None:
        super().__init__(layers, neuron)
        self.features = _Sequence(*self.features)


def floor(layers: nn.ModuleList) -> nn.Module:
    """Return the net with a ReLU over all steps at every mark; what comes before the first one runs once, as in ours."""
    return _Sequences(layers, _Floor)


class _Leaky(nn.Module):
    """snnTorch's neuron over a sequence."""

    def __init__(self, mark: Mark, beta: float) -> None:
        super().__init__()
        import snntorch

        self.feedback = mark.feedback
        self.neuron = snntorch.Leaky(
            beta=beta, threshold=1.0, reset_mechanism="zero", spike_grad=snntorch.surrogate.atan(alpha=ALPHA)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return spikes (T, B, ...)."""
        membrane, spikes, back = self.neuron.init_leaky(), [], None
        for now in x.unbind(0):
            if self.feedback is not None and back is not None:
                now = now + self.feedback(back)
            back, membrane = self.neuron(now, membrane)
            spikes.append(back)
        return torch.stack(spikes)


def snntorch_fold(layers: nn.ModuleList, beta: float) -> nn.Module:
    """Return a net whose layers see time folded, and whose neurons are snnTorch's in a loop."""
    return Repeated(layers, lambda mark: _Leaky(mark, beta))


class Repeated(_Sequences):
    """Time folded, and constant inputs repeated, as is usual; torch's pooling."""

    pool = staticmethod(lambda: nn.AvgPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K)."""
        return super().forward(x.contiguous())


class SnnTorchSteps(nn.Module):
    """The usual snnTorch network: the whole of it once per step."""

    def __init__(self, layers: nn.ModuleList, beta: float) -> None:
        super().__init__()
        self.layers = copy.deepcopy(layers)
        for place, layer in enumerate(self.layers):
            if isinstance(layer, Mark):
                self.layers[place] = _Leaky(layer, beta)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K)."""
        neurons = [layer for layer in self.layers if isinstance(layer, _Leaky)]
        membranes = {layer: layer.neuron.init_leaky() for layer in neurons}
        back: dict[nn.Module, Tensor] = {}
        total: Tensor | float = 0.0
        for now in x.unbind(0):
            for layer in self.layers:
                if not isinstance(layer, _Leaky):
                    now = layer(now)
                    continue
                if layer.feedback is not None and layer in back:
                    now = now + layer.feedback(back[layer])
                now, membranes[layer] = layer.neuron(now, membranes[layer])
                back[layer] = now
            total = total + now
        return total / len(x)  # type: ignore[return-value]


class _LIFNode(nn.Module):
    """spikingjelly's neuron in multi-step mode."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        from spikingjelly.activation_based import neuron, surrogate

        self.neuron = neuron.LIFNode(
            tau=1 / (1 - beta), decay_input=False, v_threshold=1.0, v_reset=0.0, detach_reset=True, step_mode="m",
            surrogate_function=surrogate.ATan(alpha=ALPHA),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Return spikes (T, B, ...), from rest."""
        self.neuron.reset()
        return self.neuron(x)


def spikingjelly(layers: nn.ModuleList, beta: float) -> nn.Module:
    """Return a net of spikingjelly's neurons in multi-step mode.

    Raises:
        ImportError: if spikingjelly is not installed.
        NotImplementedError: for feedback, which it steps one by one.
    """
    if any(isinstance(layer, Mark) and layer.feedback is not None for layer in layers):
        raise NotImplementedError("no multi-step mode with feedback")
    return Repeated(layers, lambda mark: _LIFNode(beta))


class Compiled(Folded):
    """Ours on compiled code, which a run takes by itself only when it has been long enough."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K)."""
        with use_path("compiled"):
            return super().forward(x)


def firing(net: Folded, x: Tensor) -> list[float]:
    """Return the share of ones behind each of our neurons."""
    rates: list[float] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: rates.append(float(out.mean())))
        for layer in net.features if isinstance(layer, LIF | RecurrentLIF)
    ]  # fmt: skip
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return rates
