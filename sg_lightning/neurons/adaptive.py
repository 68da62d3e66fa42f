"""Adaptive leaky integrate-and-fire neurons: every spike raises the own threshold for a while."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sg_lightning.neurons.base import Dynamics, check_sequence, compute_dtype
from sg_lightning.neurons.lif import _LeakyFire
from sg_lightning.neurons.reference import spike
from sg_lightning.neurons.rules import GivenSlopes, SlopeRule
from sg_lightning.neurons.surrogates import Surrogate


class ALIF(_LeakyFire):
    """Turn currents over time into spikes, with thresholds that adapt, and feed them back if wanted.

        B_t = threshold + strength b_t,             b_t = decay b_{t-1} + (1 - decay) s_{t-1}
        u_t = beta u_{t-1} + x_t + W s_{t-1} - B_{t-1} s_{t-1},     s_t = 1 where u_t > B_t else 0

    With time constants tau in steps, beta = exp(-1 / tau_m) and decay = exp(-1 / tau_a). The paper's factor 1 - beta of the
    current is left to the weights before the neuron, and its refractory period and synaptic delays are one step. The
    gradient of a spike is that of the paper: dampening * surrogate((u_t - B_t) / B_t), through u_t and B_t alike. What an
    attack puts in place of the surrogate is not dampened. It runs step by step; rules of attacks can change slopes only.

    Args:
        beta: Leak per time step in [0, 1]. A number, or a 1-d tensor with one value per channel.
        threshold: Threshold at rest, above 0. A number, or a 1-d tensor.
        decay: What is left of the adaptation after a step, in [0, 1].
        strength: How much a lasting spike in every step raises the threshold, at least 0.
        features: Number of neurons N that feed back to each other; ``None``: there is no feedback.
        detach_reset: Whether gradients stop at the reset.
        surrogate: Stand-in for the derivative of the spike, a function of (u_t - B_t) / B_t, or its name.
        dampening: Factor of the surrogate, above 0.
        learn_beta: Whether beta is a trained parameter.
        learn_threshold: Whether the threshold is a trained parameter.

    Shape:
        - Input: (T, B, ...), with feedback (T, B, N), any floating dtype; channels are axis 2.
        - Output: the same shape and dtype, values 0 and 1. The membrane is float32 (float64 for float64 inputs).

    Raises:
        ValueError: A parameter out of its range or NaN, an unknown name, vectors of different sizes; in the forward
            pass an input that is not (T, B, ...), not floating-point, or has another number of channels.

    Source:
        Bellec et al., "Long short-term memory and learning-to-learn in networks of spiking neurons", arXiv 1803.09574.
        Strength 1.8 times the threshold at rest and dampening 0.3 are the paper's; the time constants (20 ms and 200 ms there)
        are those of steps of 2 ms.
    """

    slopes_only: ClassVar[bool] = True  # other rules do not say what becomes of the adaptation

    def __init__(
        self,
        beta: float | Tensor = 0.905,
        threshold: float | Tensor = 1.0,
        *,
        decay: float = 0.99,
        strength: float = 1.8,
        features: int | None = None,
        detach_reset: bool = False,
        surrogate: Surrogate | str = "triangular",
        dampening: float = 0.3,
        learn_beta: bool = False,
        learn_threshold: bool = False,
    ) -> None:
        if features is not None and (isinstance(features, bool) or not isinstance(features, int) or features < 1):
            raise ValueError(f"features must be a whole number above 0 or None, got {features!r}")
        dynamics = Dynamics("subtract", reset_delay=True, detach_reset=detach_reset)
        super().__init__(beta, threshold, dynamics, surrogate, learn_beta, learn_threshold, None)
        self.decay = _number("decay", decay, "in [0, 1]", lambda value: 0 <= value <= 1)
        self.strength = _number("strength", strength, "finite and at least 0", lambda value: 0 <= value < math.inf)
        self.dampening = _number("dampening", dampening, "finite and above 0", lambda value: 0 < value < math.inf)
        self.features = features
        self.recurrent = None if features is None else nn.Linear(features, features, bias=False)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that build such a neuron without feedback, with its present values."""
        inherited = super().settings
        kept = {key: inherited[key] for key in ("beta", "threshold", "detach_reset", "surrogate")}
        learned = {key: inherited[key] for key in ("learn_beta", "learn_threshold")}
        return {**kept, **learned, "decay": self.decay, "strength": self.strength, "dampening": self.dampening}

    def forward(self, x: Tensor) -> Tensor:
        """Return the spikes (T, B, ...) that the currents ``x`` (T, B, ...) cause, starting from rest."""
        if self.recurrent is not None:
            check_sequence(x, "ALIF with feedback", rank=3)
            if x.shape[2] != self.features:
                raise ValueError(f"ALIF has {self.features} neurons but the input {tuple(x.shape)} has {x.shape[2]}")
        self._check(x)
        rule: Surrogate | Sequence[Surrogate] = self.gradient_rule
        if rule is self.surrogate:
            rule = _Damped(self.surrogate, self.dampening)
        if isinstance(self.attack_rule, SlopeRule) and torch.is_grad_enabled() and x.requires_grad:
            with torch.no_grad():
                z = self._simulate(x, self.gradient_rule)[1]
                rule = [GivenSlopes(step) for step in self.attack_rule.slopes(self, z).unbind(0)]
        return self._simulate(x, rule)[0]

    def _simulate(self, x: Tensor, rule: Surrogate | Sequence[Surrogate]) -> tuple[Tensor, Tensor]:
        """Return the spikes and how far the membranes are above their thresholds, in units of these, (T, B, ...)."""
        dtype = compute_dtype(x)
        beta, rest = (p.to(dtype) for p in self._broadcast(x))
        of_step = [rule] * len(x) if isinstance(rule, Surrogate) else rule
        u = s = b = torch.zeros_like(x[0], dtype=dtype)
        theta, spikes, above = rest, [], []
        for x_t, rule_t in zip(x.unbind(0), of_step, strict=True):
            reset = s.detach() if self.dynamics.detach_reset else s
            u = beta * u + x_t - theta * reset
            if self.recurrent is not None:
                u = u + self.recurrent(s.to(x.dtype))
            b = self.decay * b + (1 - self.decay) * s
            theta = rest + self.strength * b
            z = (u - theta) / theta
            s = spike(z, rule_t)
            spikes.append(s)
            above.append(z)
        return torch.stack(spikes).to(x.dtype), torch.stack(above)

    def clone(self) -> ALIF:
        """Return a separate neuron with the same settings and values."""
        return copy.deepcopy(self)

    def extra_repr(self) -> str:  # noqa: D102
        return f"{super().extra_repr()}, decay={self.decay:g}, strength={self.strength:g}, dampening={self.dampening:g}"


def _number(name: str, value: float, rule: str, legal: Callable[[float], bool]) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not legal(value):
        raise ValueError(f"{name} must be a number {rule}, got {value!r}")
    return float(value)


class _Damped(Surrogate):
    """A surrogate times a factor."""

    name = "damped"

    def __init__(self, source: Surrogate, factor: float) -> None:
        self.source, self.factor = source, factor

    def derivative(self, z: Tensor) -> Tensor:
        return self.factor * self.source.derivative(z)

    def second_derivative(self, z: Tensor) -> Tensor:
        return self.factor * self.source.second_derivative(z)
