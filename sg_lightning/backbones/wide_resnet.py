"""Spiking wide residual networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sg_lightning.backbones.base import ImageBackbone, OverTime, activations, conv3x3, initialise, over_time, positive
from sg_lightning.encoding import Encoding
from sg_lightning.neurons import LIF


class PreActivationBlock(nn.Module):
    """Two convolutions, each after norm and neuron, and a learned mix with the skip path.

    Where the width changes, the skip path is a 1 x 1 convolution of the activated input, else the input itself.
    The two weights of the mix start at one half and are free: no projection on the simplex.

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
        self.enter = OverTime(nn.BatchNorm2d(before), activation())
        self.body = OverTime(conv3x3(before, after, stride), nn.BatchNorm2d(after), activation(), conv3x3(after, after))
        self.skip = None if before == after else nn.Conv2d(before, after, 1, stride=stride, bias=False)
        self.mix = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed sequence."""
        active = self.enter(x)
        skip = x if self.skip is None else over_time(self.skip, active)
        return self.mix[0] * skip + self.mix[1] * self.body(active)


class WideResNet(ImageBackbone):
    """Classify images or frames of events with a spiking wide residual network; the default is WRN-16-4.

    A 3 x 3 convolution to 16 channels, three groups of pre-activation blocks of 16, 32 and 64 times ``widen`` channels
    (the last two halve the image), then norm, neuron, average pooling and a linear layer. Logits are means over time.
    (The mean is taken before the last layer, which is linear, so the result is the same and it runs once.)

    Args:
        depth: 6 n + 4 for n blocks in each group: 10, 16, 22, 28, ...
        widen: Factor on the widths, at least 1.
        num_classes: Number of classes K, at least 1.
        in_channels: Number of image channels C, at least 1.
        input_size: Height and width in pixels; a quarter of it, rounded up, is a multiple of ``pool``.
        time_steps: Number of steps T; ``None`` for that of ``encoding``, or 8 without one.
        encoding: How an image becomes a sequence; ``None`` for ``Direct(time_steps)``.
        neuron: Template that every layer copies; ``None`` for ``LIF()``.
        pool: Side of the last average pooling on maps of a quarter of ``input_size``.
        mean: Subtracted from the image inside the network; one value or one per channel. With a spiking encoding
            there is no normalisation.
        std: Divides the image inside the network, above 0; one value or one per channel.
        spiking: ``False`` for the ANN twin: ReLU for the neuron, one step, same parameters.

    Shape:
        (B, C, input_size, input_size) in [0, 1] to logits (B, K); with ``encoding=Frames()`` event counts
        (B, T, C, input_size, input_size).

    Raises:
        ValueError: on a depth that is not 6 n + 4, or a size that does not fit the strides and the pooling.

    Source:
        Zagoruyko and Komodakis, arXiv 1605.07146; the spiking form with a learned mix in place of the residual sum is
        that of SNN-RAT (NeurIPS 2022) and of the sparse-gradient paper's code (arXiv 2405.20355).
    """

    def __init__(
        self,
        depth: int = 16,
        widen: int = 4,
        num_classes: int = 10,
        in_channels: int = 3,
        input_size: int = 32,
        *,
        time_steps: int | None = None,
        encoding: Encoding | None = None,
        neuron: LIF | None = None,
        pool: int = 8,
        mean: float | tuple[float, ...] = 0.0,
        std: float | tuple[float, ...] = 1.0,
        spiking: bool = True,
    ) -> None:
        if positive("depth", depth) < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 10, 16, 22, 28, ... (6 n + 4), got {depth}")
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
        side = -(-input_size // 4)  # a stride of 2 rounds up
        if side % positive("pool", pool):
            raise ValueError(
                f"WideResNet makes maps of {side} x {side} of images of {input_size} x {input_size}, which do not divide "
                f"by pool={pool}; pad the images to a multiple of {4 * pool}, or give pool={side}"
            )
        activation = activations(neuron, spiking)
        self.stem = conv3x3(in_channels, 16)
        blocks: list[nn.Module] = []
        before = 16
        for group in range(3):
            after = 16 * 2**group * positive("widen", widen)
            for index in range((depth - 4) // 6):
                stride = 2 if group and not index else 1
                blocks.append(PreActivationBlock(before, after, stride, activation))
                before = after
        self.blocks = nn.Sequential(*blocks)
        self.tail = OverTime(nn.BatchNorm2d(before), activation(), nn.AvgPool2d(pool), nn.Flatten())
        self.head = nn.Linear(before * (side // pool) ** 2, num_classes)
        initialise(self)

    def embedding(self, x: Tensor) -> Tensor:
        """Return what the last layer sees, (B, F)."""
        return self.tail(self.blocks(over_time(self.stem, self.encode(x)))).mean(0)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits (B, K) for images (B, C, H, W) or frames (B, T, C, H, W)."""
        return self.head(self.embedding(x))
