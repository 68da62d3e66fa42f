"""Turn a snnTorch ``nn.Sequential`` into fused layers with equal outputs."""

from __future__ import annotations

import copy
import importlib
from typing import Any, get_args

import torch
from torch import Tensor, nn

from sg_lightning.neurons import surrogates
from sg_lightning.neurons.lif import LIF
from sg_lightning.neurons.snntorch_bridge import SpikeReadout, check_time_steps
from sg_lightning.neurons.surrogates import Surrogate

# Layers that treat every sample alone, in training too: all time steps can go through them as one batch.
_FOLDABLE = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Flatten, nn.Identity, nn.ReLU, nn.LayerNorm, nn.GroupNorm,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
_STEPPED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # batch statistics of each step on its own
_RULES = {
    "atan": surrogates.Atan,
    "fast_sigmoid": surrogates.FastSigmoid,
    "sigmoid": surrogates.Sigmoid,
    "straight_through_estimator": surrogates.StraightThrough,
}


def fuse_snntorch(net: nn.Sequential, *, time_steps: int, readout: SpikeReadout = "mean_spikes") -> FusedSequential:
    """Copy a snnTorch ``nn.Sequential`` into fused layers: the logits of ``from_snntorch``, faster.

    Layers before the first neuron are computed once, later ones for all time steps at once (batch norms step by
    step in training, to keep their statistics). Matrix kernels round by batch shape, so that in float32 a spike at
    the threshold may flip; in float64 spikes are equal. Parameters are copied.

    Args:
        net: ``nn.Sequential``, nested or not, of stateless layers and ``snntorch.Leaky``.
        time_steps: How often ``x`` is presented, 1 or more.
        readout: As in :func:`~sg_lightning.neurons.from_snntorch`.

    Returns:
        A module x (B, ...) -> logits (B, K), whose neurons are :class:`~sg_lightning.neurons.LIF`.

    Raises:
        ValueError: A layer that cannot be fused with equal outputs, named with the reason: another neuron than
            ``snntorch.Leaky``, ``reset_mechanism="subtract"`` with ``reset_delay=False`` (in snnTorch another
            function than the textbook's), inhibition, state quantisation, graded spikes, surrogates without a
            counterpart here, and layers that are random or unknown.
    """
    return FusedSequential(net, time_steps, readout)


class FusedSequential(nn.Module):
    """What :func:`fuse_snntorch` returns."""

    def __init__(self, net: nn.Sequential, time_steps: int, readout: SpikeReadout = "mean_spikes") -> None:
        super().__init__()
        if readout not in get_args(SpikeReadout):
            raise ValueError(f"unknown readout {readout!r}; choose one of {', '.join(get_args(SpikeReadout))}")
        check_time_steps(time_steps, allow_none=False)
        if type(net) is not nn.Sequential:
            raise ValueError(f"only a plain nn.Sequential can be fused, got {type(net).__name__}; use from_snntorch")
        layers = [_fused(layer, name) for name, layer in _leaves(net)]
        if not layers or not isinstance(layers[-1], LIF):
            raise ValueError("the last layer must be a snntorch.Leaky, whose spikes or membrane are read")
        self.layers = nn.ModuleList(layers)
        self.time_steps, self.readout = time_steps, readout

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of ``x`` (B, ...)."""
        static = True  # until the first neuron all time steps are equal and computed once
        *hidden, last = self.layers
        assert isinstance(last, LIF)
        for layer in hidden:
            if isinstance(layer, LIF):
                x = layer(self._currents(layer, x, static))
                static = False
            elif isinstance(layer, _STEPPED) and layer.training:
                # Seen T times even where the steps are equal: the running statistics move T times.
                x = torch.stack([layer(x if static else x[t]) for t in range(self.time_steps)])
                static = False
            else:
                x = layer(x) if static else layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        x = self._currents(last, x, static)
        if self.readout.endswith("spikes"):
            spikes = last(x)
            return spikes.mean(0) if self.readout == "mean_spikes" else spikes.sum(0)
        spikes, membrane = last.forward_membrane(x)
        if last.dynamics.reset == "zero" and not last.dynamics.reset_delay:
            membrane = (1 - spikes) * membrane  # snnTorch returns it after the reset
        return membrane[-1] if self.readout == "last_membrane" else membrane.amax(0)

    def _currents(self, layer: LIF, x: Tensor, static: bool) -> Tensor:
        x = x.expand(self.time_steps, *x.shape) if static else x
        if (layer.beta.dim() or layer.threshold.dim()) and x.dim() != 3:
            # snnTorch matches a vector with the last axis, LIF with the channels: equal for (T, B, features) only.
            raise ValueError(f"beta or threshold has one value per feature, but the layer gets {tuple(x.shape[1:])}")
        return x


def _leaves(net: nn.Sequential, prefix: str = "") -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    for name, layer in net.named_children():
        nested = type(layer) is nn.Sequential
        found += _leaves(layer, f"{prefix}{name}.") if nested else [(prefix + name, layer)]  # type: ignore[arg-type]
    return found


def _fused(layer: nn.Module, name: str) -> nn.Module:
    snn = importlib.import_module("snntorch")
    if type(layer) in _FOLDABLE + _STEPPED:
        return copy.deepcopy(layer)
    if type(layer) is not snn.Leaky:
        raise ValueError(
            f"layer {name} ({type(layer).__name__}) cannot be fused with equal outputs; use from_snntorch, which "
            "takes every network"
        )
    problem = _obstacle(layer)
    if problem:
        raise ValueError(f"layer {name} (Leaky) cannot be fused with equal outputs: {problem}; use from_snntorch")
    return _lif(layer)


def _lif(leaky: Any) -> LIF:
    def single(p: Tensor) -> Tensor:
        return p.detach().reshape(()) if p.numel() == 1 else p.detach()

    learned = isinstance(leaky.beta, nn.Parameter)
    rule = _rule(leaky.spike_grad)
    assert rule is not None  # see _obstacle
    return LIF(
        # A learned beta outside [0, 1] has no gradient in snnTorch; LIF refuses it rather than start at the border.
        single(leaky.beta) if learned else single(leaky.beta).clamp(0, 1),
        single(leaky.threshold),
        leaky.reset_mechanism,
        reset_delay=leaky.reset_delay,
        detach_reset=leaky.reset_delay,  # snnTorch detaches the delayed reset and attaches the other
        surrogate=rule,
        learn_beta=learned,
        learn_threshold=isinstance(leaky.threshold, nn.Parameter),
    )


def _obstacle(leaky: Any) -> str | None:
    factor = leaky.graded_spikes_factor
    if leaky.reset_mechanism == "subtract" and not leaky.reset_delay:
        return "its same-step subtraction is another function than the textbook's (a large residue waits one step more)"
    if leaky.inhibition or leaky.state_quant:
        return "it uses inhibition or state quantisation"
    if isinstance(factor, nn.Parameter) or bool((factor != 1).any()):
        return "it scales its spikes"
    if leaky.beta.dim() > 1 or leaky.threshold.dim() > 1:
        return "beta and threshold must be single values or one per feature"
    if leaky.surrogate_disable or _rule(leaky.spike_grad) is None:
        return f"its surrogate has no counterpart here (known: {', '.join(_RULES)})"
    return None


def _rule(spike_grad: Any) -> Surrogate | None:
    """Return our surrogate for one of ``snntorch.surrogate``, whose width sits in the closure of the function."""
    if getattr(spike_grad, "__module__", None) != "snntorch.surrogate":
        return None
    factory = getattr(spike_grad, "__qualname__", "").split(".")[0]
    if factory not in _RULES:
        return None
    return _RULES[factory](*(cell.cell_contents for cell in spike_grad.__closure__ or ()))
