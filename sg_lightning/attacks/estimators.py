"""Gradient estimators: what replaces the surrogate gradient while an attack runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from sg_lightning.neurons import SpikingNeuron, Surrogate


@dataclass(frozen=True)
class BPTT:
    """Back-propagation through time with another surrogate; the forward pass and training are not touched.

    Args:
        surrogate: The rule to use in every spiking neuron, e.g. ``Atan(2.0)``. ``None`` keeps the training surrogate.
    """

    surrogate: Surrogate | None = None

    @contextmanager
    def applied(self, model: object) -> Iterator[None]:
        """Put the rule in force inside the block.

        Raises:
            ValueError: if a surrogate is given and the model has no spiking neuron that could use it.
        """
        neurons = [m for m in model.modules() if isinstance(m, SpikingNeuron)] if isinstance(model, nn.Module) else []
        if self.surrogate is None:
            neurons = []
        elif not neurons:
            raise ValueError(
                f"the estimator {self} replaces surrogate gradients, but {type(model).__name__} has no spiking neuron of "
                "sg_lightning: wrap snnTorch networks with from_snntorch(...), and leave estimator=None for other models"
            )
        before = [neuron.attack_rule for neuron in neurons]
        try:
            for neuron in neurons:
                neuron.attack_rule = self.surrogate
            yield
        finally:
            for neuron, rule in zip(neurons, before, strict=True):
                neuron.attack_rule = rule
