"""Spiking VGG networks."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

from sg_lightning.backbones.base import ImageBackbone, OverTime, activations, initialise, widths
from sg_lightning.encoding import Encoding
from sg_lightning.neurons import LIF

Name = Literal["vgg5", "vgg11", "vgg13", "vgg16"]

# Widths of the 3 x 3 convolutions; "A" halves the image.
PLANS: dict[str, tuple[int | str, ...]] = {
    "vgg5": (64, "A", 128, 128, "A"),
    "vgg11": (64, "A", 128, 256, "A", 512, 512, 512, "A", 512, 512),
    "vgg13": (64, 64, "A", 128, 128, "A", 256, 256, "A", 512, 512, "A", 512, 512, "A"),
    "vgg16": (64, 64, "A", 128, 128, "A", 256, 256, 256, "A", 512, 512, 512, "A", 512, 512, 512, "A"),
}


class VGG(ImageBackbone):
    """Classify images with a spiking VGG: blocks of conv, norm and neuron, then wide linear layers.

    Convolutions are 3 x 3 with bias, then batch normalisation and the neuron; pooling averages after the neuron; the
    hidden linear layers have a neuron but no norm and no dropout; the last one has none. Logits are means over time.
    (The mean is taken before the last layer, which is linear, so the result is the same and it runs once.)

    Args:
        name: ``vgg5`` (3 convolutions, 2 poolings), ``vgg11`` (8, 3), ``vgg13`` (10, 5) or ``vgg16`` (13, 5).
        num_classes: Number of classes K, at least 1.
        in_channels: Number of image channels C, at least 1.
        input_size: Height and width in pixels, a multiple of 2 to the number of poolings.
        time_steps: Number of steps T; ``None`` for that of ``encoding``, or 8 without one.
        encoding: How an image becomes a sequence; ``None`` for ``Direct(time_steps)``.
        neuron: Template that every layer copies; ``None`` for ``LIF()``.
        head: Widths of the hidden linear layers, at least one.
        mean: Subtracted from the image inside the network; one value or one per channel. With a spiking encoding
            there is no normalisation.
        std: Divides the image inside the network, above 0; one value or one per channel.
        spiking: ``False`` for the ANN twin: ReLU for the neuron, one step, same parameters.

    Shape:
        (B, C, input_size, input_size) in [0, 1] to logits (B, K).

    Raises:
        ValueError: on an unknown name, or a size that the poolings do not divide.

    Source:
        VGG-11 and VGG-5: the code of the sparse-gradient paper (arXiv 2405.20355) and of SNN-RAT (NeurIPS 2022), whose
        VGG-11 pools three times and is not Simonyan and Zisserman's. VGG-13 and VGG-16: configurations B and D of
        arXiv 1409.1556 with average for max pooling, as in the same code. Weights: see ``base.initialise``.
    """

    def __init__(
        self,
        name: Name = "vgg11",
        num_classes: int = 10,
        in_channels: int = 3,
        input_size: int = 32,
        *,
        time_steps: int | None = None,
        encoding: Encoding | None = None,
        neuron: LIF | None = None,
        head: tuple[int, ...] = (4096, 4096),
        mean: float | tuple[float, ...] = 0.0,
        std: float | tuple[float, ...] = 1.0,
        spiking: bool = True,
    ) -> None:
        if name not in PLANS:
            raise ValueError(f"unknown VGG {name!r}; choose one of {', '.join(get_args(Name))}")
        super().__init__(
            num_classes=num_classes,
            in_channels=in_channels,
            input_size=input_size,
            default_steps=8,
            time_steps=time_steps,
            encoding=encoding,
            mean=mean,
            std=std,
            spiking=spiking,
        )
        poolings = PLANS[name].count("A")
        if input_size % 2**poolings:
            raise ValueError(
                f"{name} halves the image {poolings} times, so input_size must be a multiple of {2**poolings}, got "
                f"{input_size}; pad the images, or choose a VGG with fewer poolings (vgg5: 2, vgg11: 3) or ConvNet"
            )
        activation = activations(neuron, spiking)
        layers: list[nn.Module] = []
        channels = in_channels
        for item in PLANS[name]:
            if isinstance(item, str):
                layers.append(nn.AvgPool2d(2))
                continue
            layers += [nn.Conv2d(channels, item, 3, padding=1), nn.BatchNorm2d(item), activation()]
            channels = item
        layers.append(nn.Flatten())
        features = channels * (input_size // 2**poolings) ** 2
        for width in widths("head", head):
            layers += [nn.Linear(features, width), activation()]
            features = width
        self.features = OverTime(*layers)
        self.head = nn.Linear(features, num_classes)
        initialise(self)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits (B, K) for images (B, C, H, W)."""
        return self.head(self.features(self.encode(x)).mean(0))
