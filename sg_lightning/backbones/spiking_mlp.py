"""Dense and recurrent spiking networks for spike rasters."""

from __future__ import annotations

from copy import deepcopy
from typing import Literal, get_args

from torch import Tensor, nn

from sg_lightning.backbones.base import Backbone, OverTime, initialise, over_time, positive, template, widths
from sg_lightning.domains import Binary, Counts
from sg_lightning.neurons import ALIF, LIF, LeakyIntegrator, RecurrentLIF

Values = Literal["binary", "counts"]


def _recurrent(neuron: LIF | ALIF, features: int) -> RecurrentLIF | ALIF:
    """Build a recurrent layer with the settings of a template."""
    if isinstance(neuron, ALIF):
        return ALIF(features=features, **neuron.settings)
    return RecurrentLIF(features, **neuron.settings)


def _wake(layers: nn.Sequential, beta: float, time_steps: int) -> None:
    """Initialise linear layers before leaky neurons so that sparse rasters make them fire.

    Weights are normal with the deviation that gives a membrane without resets a standard deviation of 1 (the usual
    threshold) for independent inputs that spike with a probability of 0.05 per step: Rossbroich, Gygax and Zenke,
    "Fluctuation-driven initialization for spiking neural network training", arXiv 2206.10226.
    """
    memory = sum(beta ** (2 * age) for age in range(time_steps))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=(0.05 * layer.in_features * memory) ** -0.5)
            nn.init.zeros_(layer.bias)


class SpikingMLP(Backbone):
    """Classify spike rasters with linear layers, each followed by neurons, dense or recurrent.

    Args:
        in_features: Number of input channels N, at least 1.
        hidden: Widths of the hidden layers, at least one.
        num_classes: Number of classes K, at least 1.
        time_steps: Number of steps T of a raster.
        recurrent: Whether the spikes of a hidden layer also feed back into it.
        values: Whether a cell of a raster says that there was a spike, ``"binary"``, or how many, ``"counts"``.
        neuron: Template that every layer copies, a LIF or ALIF; ``None`` for ``LIF(beta=0.9)``.
        readout: What makes logits of the last layer's outputs over time; ``None`` averages them.
        spiking: ``False`` for the ANN twin: it sees the raster summed over time in one step, with ReLU for the neuron
            and the same linear layers (without feedback, which one step cannot use).

    Shape:
        (B, T, N), zeros and ones or counts, to logits (B, K).

    Raises:
        ValueError: on widths below 1, unknown ``values``, or a template with per-channel values.

    Source:
        The networks for the Spiking Heidelberg Digits of Cramer et al., arXiv 1910.07407.
    """

    def __init__(
        self,
        in_features: int = 700,
        hidden: tuple[int, ...] = (256, 256),
        num_classes: int = 20,
        *,
        time_steps: int = 100,
        recurrent: bool = False,
        values: Values = "binary",
        neuron: LIF | ALIF | None = None,
        readout: LeakyIntegrator | None = None,
        spiking: bool = True,
    ) -> None:
        if values not in get_args(Values):
            raise ValueError(f"values must be 'binary' or 'counts', got {values!r}")
        shape = (positive("time_steps", time_steps), positive("in_features", in_features))
        super().__init__(
            num_classes=num_classes,
            input_shape=shape,
            time_steps=time_steps if spiking else 1,
            spiking=spiking,
            domain=Binary() if values == "binary" else Counts(),
        )
        source = template(LIF(beta=0.9) if neuron is None else neuron)
        layers: list[nn.Module] = []
        before = in_features
        for width in widths("hidden", hidden):
            layers.append(nn.Linear(before, width))
            if not spiking:
                layers.append(nn.ReLU())
            else:
                layers.append(_recurrent(source, width) if recurrent else source.clone())
            before = width
        self.features = OverTime(*layers)
        self.head = nn.Linear(before, num_classes)
        self.readout = deepcopy(readout)
        initialise(self)
        if spiking:
            _wake(self.features, float(source.beta.detach()), time_steps)

    def _active(self, x: Tensor) -> Tensor:
        """Return the last hidden layer (T, B, F)."""
        return self.features(x.transpose(0, 1) if self.spiking else x.sum(1).unsqueeze(0))

    def embedding(self, x: Tensor) -> Tensor:
        """Return the mean over time of the last hidden layer, (B, F), whatever the readout."""
        return self._active(x).mean(0)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits (B, K) for rasters (B, T, N)."""
        if self.readout is None:
            return self.head(self.embedding(x))
        return self.readout(over_time(self.head, self._active(x)))
