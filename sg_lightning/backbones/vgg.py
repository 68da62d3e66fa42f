"""Spiking VGG networks."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

from sg_lightning.backbones.base import ImageBackbone, OverTime, activations, halvings, initialise, widths
from sg_lightning.backbones.pooling import AvgPool2
from sg_lightning.encoding import Encoding
from sg_lightning.neurons import LIF

Name = Literal["vgg5", "vgg11", "vgg13", "vgg16", "vgg_dvs"]

# Widths of the 3 x 3 convolutions; "A" halves the image.
PLANS: dict[str, tuple[int | str, ...]] = {
    "vgg5": (64, "A", 128, 128, "A"),
    "vgg11": (64, "A", 128, 256, "A", 512, 512, 512, "A", 512, 512),
    "vgg13": (64, 64, "A", 128, 128, "A", 256, 256, "A", 512, 512, "A", 512, 512, "A"),
    "vgg16": (64, 64, "A", 128, 128, "A", 256, 256, 256, "A", 512, 512, 512, "A", 512, 512, 512, "A"),
    "vgg_dvs": (64, 128, "A", 256, 256, "A", 512, 512, "A", 512, 512, "A"),
}


class VGG(ImageBackbone):
    """Classify images or frames of events with a spiking VGG: blocks of conv, norm and neuron, then linear layers.

    Convolutions are 3 x 3 with bias, then batch normalisation and the neuron; pooling averages after the neuron; the
    hidden linear layers have a neuron but no norm and no dropout; the last one has none. Logits are means over time.
    (The mean is taken before the last layer, which is linear, so the result is the same and it runs once.) Pooling a
    map of odd side leaves out its last row and column.

    Args:
        name: ``vgg5`` (3 convolutions, 2 poolings), ``vgg11`` (8, 3), ``vgg13`` (10, 5), ``vgg16`` (13, 5) or
            ``vgg_dvs`` (8, 4; for event frames of 48 x 48 pixels and more, with ``encoding=Frames()``).
        num_classes: Number of classes K, at least 1.
        in_channels: Number of image channels C, at least 1.
        input_size: Height and width in pixels, at least 2 to the number of poolings.
        time_steps: Number of steps T; ``None`` for that of ``encoding``, or 8 without one.
        encoding: How an image becomes a sequence; ``None`` for ``Direct(time_steps)``.
        neuron: Template that every layer copies; ``None`` for ``LIF()``.
        head: Widths of the hidden linear layers, ``()`` for none; ``None`` for the published ones: none in ``vgg_dvs``,
            else two of 4096.
        mean: Subtracted from the image inside the network; one value or one per channel. With a spiking encoding
            there is no normalisation.
        std: Divides the image inside the network, above 0; one value or one per channel.
        spiking: ``False`` for the ANN twin: ReLU for the neuron, one step, same parameters.

    Shape:
        (B, C, input_size, input_size) in [0, 1] to logits (B, K); with ``encoding=Frames()`` event counts
        (B, T, C, input_size, input_size).

    Raises:
        ValueError: on an unknown name, or a size that the poolings leave nothing of.

    Source:
        VGG-11 and VGG-5: the code of the sparse-gradient paper (arXiv 2405.20355) and of SNN-RAT (NeurIPS 2022), whose
        VGG-11 pools three times and is not Simonyan and Zisserman's. VGG-13 and VGG-16: configurations B and D of
        arXiv 1409.1556 with average for max pooling, as in the same code. VGG-DVS: the network for CIFAR10-DVS of Deng et
        al., "Temporal efficient training" (arXiv 2202.11946). Weights: see ``base.initialise``.
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
        head: tuple[int, ...] | None = None,
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
        side = halvings(name, input_size, PLANS[name].count("A"))
        if head is None:
            head = () if name == "vgg_dvs" else (4096, 4096)
        activation = activations(neuron, spiking)
        layers: list[nn.Module] = []
        channels = in_channels
        for item in PLANS[name]:
            if isinstance(item, str):
                layers.append(AvgPool2())
                continue
            layers += [nn.Conv2d(channels, item, 3, padding=1), nn.BatchNorm2d(item), activation()]
            channels = item
        layers.append(nn.Flatten())
        features = channels * side**2
        for width in widths("head", head) if head != () else ():
            layers += [nn.Linear(features, width), activation()]
            features = width
        self.features = OverTime(*layers)
        self.head = nn.Linear(features, num_classes)
        initialise(self)

    def embedding(self, x: Tensor) -> Tensor:
        """Return what the last layer sees, (B, F)."""
        return self.features(self.encode(x)).mean(0)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits (B, K) for images (B, C, H, W) or frames (B, T, C, H, W)."""
        return self.head(self.embedding(x))
