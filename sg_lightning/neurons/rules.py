"""What may replace the surrogate in a neuron's backward pass while an attack runs.

The forward pass stays what it is. Rules give the gradient of the input only: learned leaks, thresholds and weights
inside the neuron get none, so they are for attacks and never for training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from sg_lightning.neurons import eager, fused
from sg_lightning.neurons.base import Dynamics
from sg_lightning.neurons.surrogates import Surrogate

Pullback = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Trace:
    """What one layer did in one forward pass.

    Attributes:
        neuron: The layer; as a key it tells the layers of a network apart.
        currents: Input currents x (T, B, ...).
        membranes: Membranes u (T, B, ...) that were compared with the threshold.
        beta: Leak, broadcastable to (B, ...).
        threshold: Threshold, broadcastable to (B, ...).
        dynamics: How the neuron fires and resets.
    """

    neuron: nn.Module
    currents: Tensor
    membranes: Tensor
    beta: Tensor
    threshold: Tensor
    dynamics: Dynamics

    @property
    def spikes(self) -> Tensor:
        """Spikes s (T, B, ...) in the dtype of the membranes."""
        fires = torch.ge if self.dynamics.fire_at_threshold else torch.gt
        return fires(self.membranes, self.threshold, out=torch.empty_like(self.membranes))


class BackwardRule(ABC):
    """Gives a layer's input gradient from what the layer did; the same object serves all layers of a network."""

    @abstractmethod
    def pullback(self, trace: Trace) -> Pullback:
        """Return the map from dL/ds (T, B, ...) to dL/dx (T, B, ...)."""


class SlopeRule(BackwardRule):
    """Back-propagation through time with slopes ds/du of the rule's own, which may depend on the data."""

    @abstractmethod
    def slope(self, neuron: nn.Module, z: Tensor, past: Sequence[Tensor]) -> Tensor:
        """Return the slopes of one time step.

        Args:
            neuron: The layer.
            z: Membranes minus threshold (B, ...).
            past: Those of the steps before, oldest first; ``len(past)`` is the number of this step.
        """

    def slopes(self, neuron: nn.Module, z: Tensor) -> Tensor:
        """Return the slopes (T, B, ...) of a whole sequence of membranes minus threshold."""
        steps, phi = z.unbind(0), torch.empty_like(z)  # in the memory layout of z
        for t, step in enumerate(steps):
            phi[t] = self.slope(neuron, step, steps[:t])
        return phi

    def pullback(self, trace: Trace) -> Pullback:
        """Return the reverse scan over time with these slopes."""
        phi = self.slopes(trace.neuron, trace.membranes - trace.threshold)
        factor = eager.carry_factor(trace.membranes, phi, trace.beta, trace.threshold, trace.dynamics).expand_as(phi)

        def pull(grad: Tensor) -> Tensor:
            d = phi * grad
            for t in range(len(d) - 2, -1, -1):
                d[t].addcmul_(factor[t], d[t + 1])
            return d

        return pull


class GivenSlopes(Surrogate):
    """Slopes that are known before the backward pass, for one time step."""

    name = "given"

    def __init__(self, slopes: Tensor) -> None:
        self.slopes = slopes

    def derivative(self, z: Tensor) -> Tensor:
        """Return them."""
        return self.slopes


def simulate(
    neuron: nn.Module, x: Tensor, beta: Tensor, theta: Tensor, dynamics: Dynamics, rule: BackwardRule
) -> Tensor:
    """Run a neuron over time, from rest, and let ``rule`` give the gradient of its input.

    Args:
        neuron: The layer, for the rule.
        x: Input current (T, B, ...).
        beta: Leak, scalar or one per channel (axis 2 of ``x``).
        theta: Threshold, scalar or one per channel.
        dynamics: Reset and firing rule.
        rule: The rule.

    Returns:
        Spikes (T, B, ...) in the dtype of ``x``, equal to those without a rule.
    """
    return _Ruled.apply(x, beta.detach(), theta.detach(), dynamics, rule, neuron)


class _Ruled(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, beta: Tensor, theta: Tensor, dynamics: Dynamics, rule: BackwardRule, neuron: nn.Module
    ) -> Tensor:
        s, u = fused.simulate(x, beta, theta, dynamics, GivenSlopes(x), membrane=True)
        assert u is not None
        trailing = (1,) * (x.dim() - 3)
        beta, theta = (p.to(u.dtype).view(-1, *trailing) if p.dim() else p.to(u.dtype) for p in (beta, theta))
        ctx.pull = rule.pullback(Trace(neuron, x.detach(), u, beta, theta, dynamics))
        ctx.membrane_dtype, ctx.dtype = u.dtype, x.dtype
        return s

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # under create_graph; once_differentiable would miss paths that it is not on
            raise RuntimeError(
                "the rules of attacks give first-order gradients only; leave out create_graph=True, or use a surrogate"
            )
        return ctx.pull(grad.to(ctx.membrane_dtype)).to(ctx.dtype), None, None, None, None, None
