"""Spike-element-wise residual networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

from sg_lightning.backbones.base import ImageBackbone, OverTime, activations, conv3x3, initialise
from sg_lightning.encoding import Encoding
from sg_lightning.neurons import LIF

Name = Literal["sew_resnet18", "sew_resnet19"]


@dataclass(frozen=True)
class Plan:
    """Width and number of the blocks of each stage (from the second on, the first block halves the image).

    ``large``: the first layer is 7 x 7 with stride 2 and a max pooling follows, for large images; else 3 x 3. ``hidden``:
    width of a linear layer before the last, 0 for none.
    """

    stages: tuple[tuple[int, int], ...]
    large: bool
    hidden: int


PLANS: dict[str, Plan] = {
    "sew_resnet18": Plan(((64, 2), (128, 2), (256, 2), (512, 2)), large=True, hidden=0),
    "sew_resnet19": Plan(((128, 3), (256, 3), (512, 2)), large=False, hidden=256),
}


class SpikeElementWiseBlock(nn.Module):
    """Two times conv, norm and neuron; the spikes are added to those of the skip path (ADD).

    Where width or size change, the skip path is a 1 x 1 convolution with norm and neuron, else the input itself. Sums of
    spikes are whole numbers, which grow by at most 1 per block.

    Args:
        before: Channels of the input.
        after: Channels of the output.
        stride: 2 halves the image.
        activation: Maker of fresh neurons.

    Shape:
        (T, B, before, H, W) to (T, B, after, H / stride, W / stride).
    """

    def __init__(self, before: int, after: int, stride: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.body = OverTime(
            conv3x3(before, after, stride), nn.BatchNorm2d(after), activation(),
            conv3x3(after, after), nn.BatchNorm2d(after), activation(),
        )  # fmt: skip
        self.skip = None
        if before != after or stride != 1:
            self.skip = OverTime(
                nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after), activation()
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the two paths."""
        return self.body(x) + (x if self.skip is None else self.skip(x))


class SEWResNet(ImageBackbone):
    """Classify images or frames of events with a spike-element-wise residual network.

    Unlike in a ResNet whose neuron follows the sum, a block whose own spikes are silent passes its input on unchanged, so
    deep networks can be trained. Convolutions have no bias; the last maps are averaged over the image; logits are means
    over time.

    Args:
        name: ``sew_resnet18``: 7 x 7 convolution with stride 2, max pooling, stages of 64, 128, 256 and 512 channels with
            two blocks each, for large images. ``sew_resnet19``: 3 x 3 convolution, stages of 128, 256 and 512 channels
            with three, three and two blocks, then linear layers of 256 and K, for 32 x 32 or 48 x 48 pixels.
        num_classes: Number of classes K, at least 1.
        in_channels: Number of image channels C, at least 1.
        input_size: Height and width in pixels; strides round odd sides up.
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
        ValueError: on an unknown name or sizes below 1.

    Source:
        Fang et al., "Deep residual learning in spiking neural networks", arXiv 2102.04159 (blocks with ADD, 18 layers,
        4 steps); widths of the 19 layers: Zheng et al., "Going deeper with directly-trained larger spiking neural
        networks", arXiv 2011.05280, whose own blocks fire after the sum. Weights: see ``base.initialise``.
    """

    def __init__(
        self,
        name: Name = "sew_resnet18",
        num_classes: int = 10,
        in_channels: int = 3,
        input_size: int = 32,
        *,
        time_steps: int | None = None,
        encoding: Encoding | None = None,
        neuron: LIF | None = None,
        mean: float | tuple[float, ...] = 0.0,
        std: float | tuple[float, ...] = 1.0,
        spiking: bool = True,
    ) -> None:
        if name not in PLANS:
            raise ValueError(f"unknown SEWResNet {name!r}; choose one of {', '.join(get_args(Name))}")
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
        plan = PLANS[name]
        activation = activations(neuron, spiking)
        before = plan.stages[0][0]
        stem: list[nn.Module] = [conv3x3(in_channels, before)]
        if plan.large:
            stem = [nn.Conv2d(in_channels, before, 7, stride=2, padding=3, bias=False)]
        stem += [nn.BatchNorm2d(before), activation()]
        if plan.large:
            stem.append(nn.MaxPool2d(3, stride=2, padding=1))
        self.stem = OverTime(*stem)
        blocks: list[nn.Module] = []
        for stage, (after, number) in enumerate(plan.stages):
            for index in range(number):
                blocks.append(SpikeElementWiseBlock(before, after, 2 if stage and not index else 1, activation))
                before = after
        self.blocks = nn.Sequential(*blocks)
        tail: list[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        if plan.hidden:
            tail += [nn.Linear(before, plan.hidden), activation()]
        self.tail = OverTime(*tail)
        self.head = nn.Linear(plan.hidden or before, num_classes)
        initialise(self)

    def embedding(self, x: Tensor) -> Tensor:
        """Return what the last layer sees, (B, F)."""
        return self.tail(self.blocks(self.stem(self.encode(x)))).mean(0)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits (B, K) for images (B, C, H, W) or frames (B, T, C, H, W)."""
        return self.head(self.embedding(x))
