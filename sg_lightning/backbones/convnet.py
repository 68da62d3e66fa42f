"""A small spiking convolutional network."""

from __future__ import annotations

from torch import Tensor, nn

from sg_lightning.backbones.base import ImageBackbone, OverTime, activations, halvings, initialise, positive, widths
from sg_lightning.backbones.pooling import AvgPool2
from sg_lightning.encoding import Encoding
from sg_lightning.neurons import LIF


class ConvNet(ImageBackbone):
    """Classify small images, or frames of events, with a few convolutions and one hidden linear layer.

    Each stage is conv 3 x 3, batch norm, neuron, average pooling by 2; then linear, neuron, and a linear layer whose
    outputs are averaged over time. Made for 8 x 8 to 34 x 34 pixels; trains in seconds on one CPU core. Pooling a map
    of odd side leaves out its last row and column (34 pixels: 17, then 8).

    Args:
        num_classes: Number of classes K, at least 1.
        in_channels: Number of image channels C, at least 1.
        input_size: Height and width in pixels, at least 2 to the number of stages.
        channels: Width of each stage.
        hidden: Width of the hidden linear layer.
        time_steps: Number of steps T; ``None`` for that of ``encoding``, or 4 without one.
        encoding: How an image becomes a sequence; ``None`` for ``Direct(time_steps)``.
        neuron: Template that every layer copies; ``None`` for ``LIF()``.
        mean: Subtracted from the image inside the network; one value or one per channel. With a spiking encoding
            there is no normalisation.
        std: Divides the image inside the network, above 0; one value or one per channel.
        spiking: ``False`` for the ANN twin: ReLU for the neuron, one step, same parameters.

    Shape:
        (B, C, input_size, input_size) in [0, 1] to logits (B, K); with ``encoding=Frames()`` event counts
        (B, T, C, input_size, input_size).

    Raises:
        ValueError: on a size that the stages leave nothing of.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        input_size: int = 8,
        *,
        channels: tuple[int, ...] = (32, 64),
        hidden: int = 128,
        time_steps: int | None = None,
        encoding: Encoding | None = None,
        neuron: LIF | None = None,
        mean: float | tuple[float, ...] = 0.0,
        std: float | tuple[float, ...] = 1.0,
        spiking: bool = True,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            in_channels=in_channels,
            input_size=input_size,
            default_steps=4,
            time_steps=time_steps,
            encoding=encoding,
            mean=mean,
            std=std,
            spiking=spiking,
        )
        stages = widths("channels", channels)
        side = halvings("ConvNet", input_size, len(stages))
        activation = activations(neuron, spiking)
        layers: list[nn.Module] = []
        for before, after in zip((in_channels, *stages), stages, strict=False):
            # No bias: the norm has one.
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)]
            layers += [activation(), AvgPool2()]
        features = stages[-1] * side**2
        layers += [nn.Flatten(), nn.Linear(features, positive("hidden", hidden)), activation()]
        self.features = OverTime(*layers)
        self.head = nn.Linear(hidden, num_classes)
        initialise(self)

    def embedding(self, x: Tensor) -> Tensor:
        """Return what the last layer sees, (B, F)."""
        return self.features(self.encode(x)).mean(0)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits (B, K) for images (B, C, H, W) or frames (B, T, C, H, W)."""
        return self.head(self.embedding(x))
