"""Leaky integrate-and-fire layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from sg_lightning.neurons import fused, paths, recurrence, reference, rules
from sg_lightning.neurons.base import (
    Dynamics,
    Reset,
    SpikingNeuron,
    check_sequence,
    checked_parameter,
    compute_dtype,
    resolve_surrogate,
)
from sg_lightning.neurons.rules import BackwardRule, GivenSlopes, SlopeRule
from sg_lightning.neurons.surrogates import Surrogate

Backend = Literal["fused", "reference"]


class _LeakyFire(SpikingNeuron):
    """Parameters and checks that feed-forward and recurrent LIF layers share."""

    beta: Tensor
    threshold: Tensor

    def __init__(
        self,
        beta: float | Tensor,
        threshold: float | Tensor,
        dynamics: Dynamics,
        surrogate: Surrogate | str,
        learn_beta: bool,
        learn_threshold: bool,
        channels: int | None,
    ) -> None:
        super().__init__()
        self.dynamics = dynamics
        self.surrogate = resolve_surrogate(surrogate)
        leak = checked_parameter("beta", beta, channels, high=1.0)
        level = checked_parameter("threshold", threshold, channels)
        if leak.dim() and level.dim() and len(leak) != len(level):
            raise ValueError(
                f"beta has {len(leak)} values but threshold has {len(level)}; give one per channel in both"
            )
        for name, value, learned in (("beta", leak, learn_beta), ("threshold", level, learn_threshold)):
            if learned:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that build such a neuron, with its present values, e.g. ``RecurrentLIF(256, **lif.settings)``."""
        return {
            "beta": self.beta.detach().clone(),
            "threshold": self.threshold.detach().clone(),
            **asdict(self.dynamics),
            "surrogate": self.surrogate,
            "learn_beta": isinstance(self.beta, nn.Parameter),
            "learn_threshold": isinstance(self.threshold, nn.Parameter),
        }

    def extra_repr(self) -> str:
        def show(p: Tensor) -> str:
            value = f"{p.item():g}" if p.dim() == 0 else f"{p.numel()} values"
            return f"{value}, learned" if isinstance(p, nn.Parameter) else value

        d = self.dynamics
        flags = [name for name in ("reset_delay", "detach_reset", "fire_at_threshold") if getattr(d, name)]
        head = f"beta={show(self.beta)}, threshold={show(self.threshold)}, reset={d.reset!r}"
        return ", ".join([head, *flags, str(self.surrogate)])

    def _leak(self) -> Tensor:
        return self.beta.clamp(0, 1) if self.beta.requires_grad else self.beta

    def _broadcast(self, x: Tensor) -> tuple[Tensor, Tensor]:
        trailing = (1,) * (x.dim() - 3)
        beta, theta = (p.view(-1, *trailing) if p.dim() else p for p in (self._leak(), self.threshold))
        return beta, theta

    def _rule_of_steps(
        self, x: Tensor, beta: Tensor, theta: Tensor, recurrent: Callable[[Tensor], Tensor] | None = None
    ) -> Surrogate | list[Surrogate]:
        """Return the surrogate, or the slopes that an attack gives to each step, for which a first pass is needed."""
        if not isinstance(self.attack_rule, SlopeRule) or not torch.is_grad_enabled() or not x.requires_grad:
            return self.gradient_rule
        with torch.no_grad():
            u = reference.simulate(x, beta, theta, self.dynamics, self.gradient_rule, recurrent=recurrent)[1]
            return [GivenSlopes(step) for step in self.attack_rule.slopes(self, u - theta).unbind(0)]

    def _check(self, x: Tensor) -> None:
        check_sequence(x, type(self).__name__)
        for name, p in (("beta", self.beta), ("threshold", self.threshold)):
            if p.dim() and (x.dim() < 3 or x.shape[2] != p.numel()):
                got = f"{x.shape[2]} channels" if x.dim() > 2 else "no channel axis"
                raise ValueError(
                    f"{name} has {p.numel()} values, one per channel, but the input {tuple(x.shape)} has {got} "
                    "(axis 2 of (T, B, C, ...)); make both equal or use a single value"
                )


class LIF(_LeakyFire):
    """Turn currents over time into spikes: leaky integrate-and-fire neurons.

    u_t = beta c_{t-1} + x_t, s_t = 1 where u_t > threshold else 0, and a spike resets what is carried on (c_t).
    The layer keeps no state between calls. The defaults are the neuron of the SR paper but for ``fire_at_threshold``;
    ``reset="subtract", reset_delay=True, detach_reset=True, surrogate=Atan(2.0)`` is ``snntorch.Leaky``'s default.
    NaN in the input never fires and makes the gradients of its neuron NaN.

    Args:
        beta: Leak per time step in [0, 1]; 1 does not leak. A number, or a 1-d tensor with one value per channel.
            A learned one is clamped to [0, 1] when used, with zero gradient outside.
        threshold: Membrane above which the neuron fires, above 0. A number, or a 1-d tensor.
        reset: ``"zero"`` empties the membrane, ``"subtract"`` takes the threshold off, ``"none"`` leaves it.
        reset_delay: Whether the reset acts at the next step. This changes the spikes with ``"subtract"`` only.
        detach_reset: Whether gradients stop at the reset.
        fire_at_threshold: Whether a membrane equal to the threshold fires (>=, as in the SR paper's code) or not (>).
        surrogate: Stand-in for the derivative of the spike, or the name of one with its default width
            (``"triangular"`` is ``Triangular(1.0)``).
        learn_beta: Whether beta is a trained parameter.
        learn_threshold: Whether the threshold is a trained parameter.
        channels: Number of channels, to repeat scalars and so learn one value for each; checked against vectors.
        backend: ``"fused"`` (fast, by a path that :class:`~sg_lightning.neurons.use_path` chooses) or ``"reference"``
            (readable); equal spikes, gradients equal up to rounding.

    Shape:
        - Input: (T, B, ...), any floating dtype; channels are axis 2.
        - Output: the same shape and dtype, values 0 and 1. The membrane is float32 (float64 for float64 inputs).

    Raises:
        ValueError: A parameter out of its range or NaN, an unknown name, vectors of different sizes; in the forward
            pass an input that is not (T, B, ...), not floating-point, or has another number of channels.

    Source: equations and order of operations as in snnTorch's ``Leaky`` (Eshraghian et al., arXiv 2109.12894).

    Example:
        >>> import torch
        >>> neuron = LIF(beta=1.0, threshold=1.0)
        >>> neuron(torch.tensor([0.6, 0.6, 0.6]).view(3, 1)).flatten()
        tensor([0., 1., 0.])
    """

    def __init__(
        self,
        beta: float | Tensor = 1.0,
        threshold: float | Tensor = 1.0,
        reset: Reset = "zero",
        *,
        reset_delay: bool = False,
        detach_reset: bool = False,
        fire_at_threshold: bool = False,
        surrogate: Surrogate | str = "triangular",
        learn_beta: bool = False,
        learn_threshold: bool = False,
        channels: int | None = None,
        backend: Backend = "fused",
    ) -> None:
        if backend not in get_args(Backend):
            raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(get_args(Backend))}")
        dynamics = Dynamics(reset, reset_delay, detach_reset, fire_at_threshold)
        super().__init__(beta, threshold, dynamics, surrogate, learn_beta, learn_threshold, channels)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """Return the spikes (T, B, ...) that the currents ``x`` (T, B, ...) cause, starting from rest."""
        self._check(x)
        if isinstance(self.attack_rule, BackwardRule) and torch.is_grad_enabled() and x.requires_grad:
            return rules.simulate(self, x, self._leak(), self.threshold, self.dynamics, self.attack_rule)
        if self._readable(self.gradient_rule):
            beta, theta = self._broadcast(x)
            return reference.simulate(x, beta, theta, self.dynamics, self.gradient_rule)[0]
        return fused.simulate(x, self._leak(), self.threshold, self.dynamics, self.gradient_rule)[0]

    def forward_membrane(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return spikes and the membranes u that were compared with the threshold, both (T, B, ...)."""
        self._check(x)
        beta, theta = self._broadcast(x)
        rule = self._rule_of_steps(x, beta, theta)
        if not isinstance(rule, Surrogate) or self._readable(rule):
            return reference.simulate(x, beta, theta, self.dynamics, rule)[:2]
        spikes, membrane = fused.simulate(x, self._leak(), self.threshold, self.dynamics, rule, membrane=True)
        assert membrane is not None
        return spikes, membrane

    def forward_state(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Continue from a state, for sequences that come in pieces.

        Args:
            x: Currents (T, B, ...) of the next T steps.
            state: What the call before returned, (B, ...); ``None`` starts from rest. It carries its gradient:
                detach it to cut back-propagation through time.

        Returns:
            The spikes (T, B, ...), equal to those of one call on the whole sequence, and the new state (B, ...).
        """
        self._check(x)
        if state is not None and state.shape != x.shape[1:]:
            raise ValueError(f"state has shape {tuple(state.shape)}, but the input needs {tuple(x.shape[1:])}")
        beta, theta = (p.to(compute_dtype(x)) for p in self._broadcast(x))
        if self._readable(self.gradient_rule):
            spikes, _, state = reference.simulate(x, beta, theta, self.dynamics, self.gradient_rule, state=state)
            return spikes, state
        # What the state adds to the first step goes into its current, in the order in which the loop adds it up.
        current = x if state is None else torch.cat([self._with_state(x[:1], state, beta, theta), x[1:].to(beta.dtype)])
        spikes, u = fused.simulate(
            current, self._leak(), self.threshold, self.dynamics, self.gradient_rule, membrane=True
        )
        assert u is not None
        return spikes.to(x.dtype), self._state(u[-1], spikes[-1].to(u.dtype), theta)

    def _with_state(self, x: Tensor, state: Tensor, beta: Tensor, theta: Tensor) -> Tensor:
        dynamics = self.dynamics
        if not dynamics.reset_delay or dynamics.reset == "none":
            return beta * state + x
        fired = reference.spike(state - theta, self.gradient_rule, dynamics.fire_at_threshold)
        fired = fired.detach() if dynamics.detach_reset else fired
        if dynamics.reset == "zero":
            return beta * ((1 - fired) * state) + x
        return beta * state + x - fired * theta

    def _state(self, u: Tensor, fired: Tensor, theta: Tensor) -> Tensor:
        dynamics = self.dynamics
        if dynamics.reset_delay or dynamics.reset == "none":
            return u
        fired = fired.detach() if dynamics.detach_reset else fired
        return (1 - fired) * u if dynamics.reset == "zero" else u - fired * theta

    def path(self, x: Tensor) -> paths.Choice:
        """Say which path a forward pass with input ``x`` (T, B, ...) takes now, and why."""
        self._check(x)
        if isinstance(self.attack_rule, BackwardRule) and torch.is_grad_enabled() and x.requires_grad:
            why = f"its forward pass; the backward pass is that of {type(self.attack_rule).__name__}"
        elif self._readable(self.gradient_rule):
            why = "asked for" if self.gradient_rule.code else f"{self.gradient_rule!r} is no dataclass of numbers"
            return paths.Choice("reference", why)
        else:
            why = ""
        found = fused.path(x, self.dynamics, keep=torch.is_grad_enabled() and self._is_graded(x))
        return paths.Choice(found.path, f"{found.why}; {why}" if why else found.why)

    def clone(self) -> LIF:
        """Return a separate neuron with the same settings and values."""
        return copy.deepcopy(self)

    def _readable(self, rule: Surrogate) -> bool:
        """Whether the loop of the reference runs: asked for, or the surrogate cannot be handed to an operator."""
        return self.backend == "reference" or paths.wanted() == "reference" or not rule.code

    def _is_graded(self, x: Tensor) -> bool:
        return x.requires_grad or self.beta.requires_grad or self.threshold.requires_grad


class RecurrentLIF(_LeakyFire):
    """Turn currents over time into spikes that also feed back to all neurons of the layer.

    As :class:`LIF` with x_t + W s_{t-1} for x_t. It runs step by step, as the feedback cannot be fused over time; the backward
    pass is a closed form that keeps the membranes only.

    Args:
        features: Number of neurons N.
        beta: As in :class:`LIF`; vectors have one value per neuron.
        threshold: As in :class:`LIF`.
        reset: As in :class:`LIF`.
        reset_delay: As in :class:`LIF`.
        detach_reset: As in :class:`LIF`.
        fire_at_threshold: As in :class:`LIF`.
        surrogate: As in :class:`LIF`.
        learn_beta: As in :class:`LIF`.
        learn_threshold: As in :class:`LIF`.
        bias: Whether the feedback has a bias.

    Shape:
        - Input: (T, B, N).
        - Output: (T, B, N), values 0 and 1.

    Raises:
        ValueError: As in :class:`LIF`, and if N of the input is not ``features``.
    """

    slopes_only: ClassVar[bool] = True  # other rules do not say what becomes of the feedback

    def __init__(
        self,
        features: int,
        beta: float | Tensor = 1.0,
        threshold: float | Tensor = 1.0,
        reset: Reset = "zero",
        *,
        reset_delay: bool = False,
        detach_reset: bool = False,
        fire_at_threshold: bool = False,
        surrogate: Surrogate | str = "triangular",
        learn_beta: bool = False,
        learn_threshold: bool = False,
        bias: bool = False,
    ) -> None:
        if isinstance(features, bool) or not isinstance(features, int) or features < 1:
            raise ValueError(f"features must be a whole number above 0, got {features!r}")
        dynamics = Dynamics(reset, reset_delay, detach_reset, fire_at_threshold)
        super().__init__(beta, threshold, dynamics, surrogate, learn_beta, learn_threshold, None)
        for name, p in (("beta", self.beta), ("threshold", self.threshold)):
            if p.dim() and p.numel() != features:
                raise ValueError(f"{name} has {p.numel()} values but features={features}; give one per neuron")
        self.features = features
        self.recurrent = nn.Linear(features, features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the spikes (T, B, N) that the currents ``x`` (T, B, N) cause, starting from rest."""
        self._check(x)
        beta, theta = self._broadcast(x)
        rule = self._rule_of_steps(x, beta, theta, self.recurrent)
        # A compiler takes the readable loop apart by itself.
        readable = (
            paths.wanted() == "reference" or torch.compiler.is_compiling() or not recurrence.serves(self.recurrent)
        )
        if isinstance(rule, Surrogate) and not readable:
            return recurrence.simulate(x, self.recurrent, beta, theta, self.dynamics, rule)
        return reference.simulate(x, beta, theta, self.dynamics, rule, recurrent=self.recurrent)[0]

    def forward_state(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Continue from a state; as in :class:`LIF`, with a state (2, B, N): that of the membranes, and the last spikes."""
        self._check(x)
        if state is not None and state.shape != (2, *x.shape[1:]):
            raise ValueError(f"state has shape {tuple(state.shape)}, but the input needs {(2, *x.shape[1:])}")
        beta, theta = self._broadcast(x)
        before, fired = (None, None) if state is None else state.unbind(0)
        spikes, _, after = reference.simulate(
            x, beta, theta, self.dynamics, self.gradient_rule,
            state=before, spikes_before=fired, recurrent=self.recurrent,
        )  # fmt: skip
        return spikes, torch.stack([after, spikes[-1].to(after.dtype)])

    def _check(self, x: Tensor) -> None:
        check_sequence(x, "RecurrentLIF", rank=3)
        if x.shape[2] != self.features:
            raise ValueError(
                f"RecurrentLIF has {self.features} neurons but the input {tuple(x.shape)} has {x.shape[2]}"
            )
