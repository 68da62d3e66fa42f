"""What all backbones share: the contract with the rest of the library, time folding, neurons, normalisation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sg_lightning.backbones.recomputation import Recompute, again, in_pieces, refuse_pieces, segments
from sg_lightning.domains import Domain
from sg_lightning.encoding import Direct, Encoding
from sg_lightning.neurons import ALIF, LIF, SpikingNeuron
from sg_lightning.recipes import Recorded


def over_time(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer without memory to every step of a sequence.

    Time is folded into the batch, so the layer runs once on (T B, ...). A sequence that is the same at every step (an
    expanded view, as from :class:`~sg_lightning.encoding.Direct`) stays one: the layer runs once on (B, ...).
    Batch normalisation in training mode sees the same mean and biased variance either way; only the unbiased variance
    that enters its running average is over n instead of T n values, larger by (T n - 1) / (T (n - 1)), for B = 64 and
    8 x 8 pixels by less than 0.03 %. We keep that.

    Shape:
        (T, B, ...) to (T, B, ...).
    """
    if x.stride(0) == 0 or x.shape[0] == 1:
        once = layer(x[0])
        return once.unsqueeze(0).expand(x.shape[0], *once.shape)
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class OverTime(nn.Sequential):
    """Apply layers in turn to a sequence (T, B, ...): neurons see time, all other layers see it folded away.

    Attributes:
        recompute: What the backward pass computes again instead of keeping it, see :func:`recompute`.
    """

    in_order = True  # each layer's output is the next one's input: attacks may fold batch norms
    recompute: Recompute | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the sequence (T, B, ...) after the last layer."""
        layers = list(self)
        if self.recompute is None:
            return _in_turn(layers, x)
        if isinstance(self.recompute, int):
            neurons = [layer for layer in layers if isinstance(layer, SpikingNeuron)]
            if not torch.is_grad_enabled() or any(neuron.attack_rule is not None for neuron in neurons):
                return _in_turn(layers, x)  # the rules of attacks look at whole sequences
            return in_pieces(partial(_onwards, layers), layers, x, self.recompute, [None] * len(neurons))
        for part, repeated in segments(layers, self.recompute):
            run = partial(_in_turn, part)
            x = again(run, part, x) if repeated else run(x)
        return x


def _in_turn(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x) if isinstance(layer, SpikingNeuron) else over_time(layer, x)
    return x


def _onwards(layers: Sequence[nn.Module], x: Tensor, *states: Tensor | None) -> tuple[Tensor | None, ...]:
    """Apply layers to a piece of a sequence; return it and the neurons' new states."""
    before, after = iter(states), []
    for layer in layers:
        if isinstance(layer, SpikingNeuron):
            x, state = layer.forward_state(x, next(before))  # type: ignore[operator]
            after.append(state)
        else:
            x = over_time(layer, x)
    return x, *after


def checked_recompute(what: Recompute | None) -> Recompute | None:
    """Return what is to be recomputed, or raise ``ValueError`` if there is no such thing."""
    steps = isinstance(what, int) and not isinstance(what, bool) and what >= 1
    if not steps and what not in (None, "norms", "blocks"):
        raise ValueError(f"recompute must be 'norms', 'blocks', a number of steps >= 1 or None, got {what!r}")
    return what


def recompute(network: nn.Module, what: Recompute | None) -> None:
    """Let training keep fewer activations of a network, and compute the others again in the backward pass.

    ``"norms"`` keeps what goes into a batch norm and the spikes behind it, and repeats norm and neuron, which are cheap.
    ``"blocks"`` keeps spikes only and repeats all that lies between, so about one forward pass more. Together with
    :class:`~sg_lightning.neurons.compact_spikes`, spikes then take a byte each. Loss, gradients and batch-norm statistics
    are the same. A number n, for long sequences: run n steps at a time and keep the neurons' states between; memory for
    activations is that of n steps, losses are the same, gradients equal up to rounding, and random layers draw other
    numbers.

    Args:
        network: A network of this library, or one with :class:`OverTime` inside.
        what: ``"norms"``, ``"blocks"``, a number of steps, or ``None`` to keep everything.

    Raises:
        ValueError: An unknown ``what``, or a network without such layers; a number of steps with batch norms, whose
            statistics are those of all steps, or with neurons that cannot continue from a state.

    Source:
        Chen et al., "Training deep nets with sublinear memory cost", arXiv 1604.06174.
    """
    checked_recompute(what)
    found = [module for module in network.modules() if isinstance(module, OverTime)]
    if not found:
        raise ValueError(
            f"{type(network).__name__} has no OverTime inside, so there is nothing to recompute; build it of "
            "sg_lightning.backbones, or call torch.utils.checkpoint in your own network"
        )
    if isinstance(what, int):
        refuse_pieces(found)
    for module in found:
        module.recompute = what


def positive(name: str, value: object) -> int:
    """Return ``value`` if it is an integer of at least 1, else raise ``ValueError`` naming the argument."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return value


def widths(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """Check a non-empty sequence of layer widths."""
    if isinstance(values, (str, int)) or len(values) == 0:
        raise ValueError(f"{name} must list at least one width, such as (64, 128), got {values!r}")
    return tuple(positive(f"{name}[{i}]", value) for i, value in enumerate(values))


def template(neuron: LIF | ALIF | None) -> LIF | ALIF:
    """Return the neuron that every layer gets a copy of.

    Raises:
        TypeError: if it is neither a LIF nor an ALIF.
        ValueError: if it has per-channel values or feedback, which cannot fit layers of different widths.
    """
    if neuron is None:
        return LIF()
    if not isinstance(neuron, LIF | ALIF):
        raise TypeError(
            f"neuron must be a LIF or ALIF, a template that every layer copies, got {type(neuron).__name__}"
        )
    if isinstance(neuron, ALIF) and neuron.features is not None:
        raise ValueError(
            "neuron has features, but layers of different widths copy it: leave it out (recurrent=True adds it)"
        )
    if neuron.beta.dim() or neuron.threshold.dim():
        raise ValueError(
            "neuron has per-channel values, but layers of different widths copy it; give scalars, e.g. "
            "LIF(beta=0.9, learn_beta=True), which every layer learns for itself"
        )
    return neuron


def activations(neuron: LIF | ALIF | None, spiking: bool) -> Callable[[], nn.Module]:
    """Return a maker of fresh non-linearities: copies of the template neuron, or ReLU in the ANN twin."""
    source = template(neuron)
    return source.clone if spiking else nn.ReLU


def conv3x3(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    """Make a 3 x 3 convolution that keeps the size, or halves it; without bias, since a norm follows or came before."""
    return nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)


def initialise(network: nn.Module) -> None:
    """Initialise all weights so that every layer of a fresh network fires in training mode.

    (In evaluation mode the running statistics of batch norm have seen no data yet, and deep layers are silent.)

    Convolutions: normal, He et al. (arXiv 1502.01852) over the fan-out, as the sparse-gradient code. Linear layers:
    the same over the fan-in, zero bias; that code keeps torch's uniform default, six times smaller in variance, which
    leaves its hidden linear layers silent until training wakes them. Weights inside a neuron (feedback) stay as they are.
    """
    inside = {inner for neuron in network.modules() if isinstance(neuron, SpikingNeuron) for inner in neuron.modules()}
    for module in network.modules():
        if module in inside:
            continue
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)


class Backbone(Recorded, nn.Module, ABC):
    """A network from inputs in their natural units to logits; to bring your own, subclass it and write ``logits``.

    Encoding, normalisation and repetition over time happen inside, no state survives a call, and sample i of the
    output depends on sample i of the input only (but for batch normalisation in training mode).

    Args:
        num_classes: Number of classes K, at least 1.
        input_shape: Shape of one sample, without the batch axis.
        time_steps: Number of simulated steps T; 1 for a network without spikes.
        spiking: Whether the network has spiking neurons; ``False`` for the ANN twin.
        domain: Legal values of an input.

    Shape:
        (B, *input_shape) to (B, K).

    Raises:
        ValueError: in :meth:`forward`, if the input has another shape or is not floating point.
        TypeError: in :meth:`forward`, if the input is not a tensor.
    """

    def __init__(
        self, *, num_classes: int, input_shape: tuple[int, ...], time_steps: int, spiking: bool, domain: Domain
    ) -> None:
        super().__init__()
        self.num_classes = positive("num_classes", num_classes)
        self.input_shape = input_shape
        self.time_steps = positive("time_steps", time_steps)
        self.spiking = spiking
        self.domain = domain

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) for inputs (B, *input_shape)."""
        self.check_input(x)
        return self.logits(x)

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Compute logits (B, K) of an input whose shape has been checked."""

    def embedding(self, x: Tensor) -> Tensor:
        """Compute what the last layer sees, (B, F): the mean over time of the last hidden layer's spikes.

        Raises:
            NotImplementedError: if the network has none; every one of this library has.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its last layer sees; write embedding(x)")

    def check_input(self, x: Tensor) -> None:
        """Raise an error that says what is wrong if ``x`` is not a float batch of samples of ``input_shape``."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{type(self).__name__} needs a tensor, got {type(x).__name__}")
        if x.dim() != len(self.input_shape) + 1 or tuple(x.shape[1:]) != self.input_shape:
            wanted = ", ".join(str(n) for n in ("B", *self.input_shape))
            raise ValueError(
                f"{type(self).__name__} was built for inputs of shape ({wanted}), got {tuple(x.shape)}; "
                "reshape the data or build the backbone for its shape"
            )
        if not x.is_floating_point():
            raise ValueError(f"{type(self).__name__} needs floating-point inputs, got {x.dtype}; convert with .float()")


def _per_channel(name: str, value: float | Sequence[float], channels: int) -> Tensor:
    values = torch.as_tensor(value, dtype=torch.get_default_dtype()).flatten()
    if values.numel() not in (1, channels):
        raise ValueError(f"{name} has {values.numel()} values for {channels} channels; give one, or one per channel")
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} must be finite, got {value}")
    return values.expand(channels).reshape(1, channels, 1, 1).clone()


class ImageBackbone(Backbone):
    """Base of networks for square images in [0, 1], or with ``Frames`` for event frames of that size.

    Args:
        num_classes: Number of classes K.
        in_channels: Number of image channels or polarities C.
        input_size: Height and width in pixels.
        default_steps: Number of steps if neither ``time_steps`` nor ``encoding`` says it.
        time_steps: Number of steps T, or ``None``.
        encoding: How an image becomes a sequence; ``None`` for ``Direct(time_steps)``.
        mean: Subtracted inside the network, in units of the input; one value or one per channel.
        std: Divided by inside the network, above 0; one value or one per channel.
        spiking: ``False`` for the ANN twin. It sees an image once and without encoding, frames as their sum over time.

    Raises:
        ValueError: on sizes below 1, ``std`` <= 0, a ``time_steps`` that is not the encoding's, or a normalisation of
            frames.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        input_size: int,
        default_steps: int,
        time_steps: int | None,
        encoding: Encoding | None,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        spiking: bool,
    ) -> None:
        if encoding is None:
            encoding = Direct(default_steps if time_steps is None else time_steps)
        encoding = encoding.fitted(time_steps, default_steps)
        if not spiking and not encoding.frames:
            encoding = Direct(1)
        image = (positive("in_channels", in_channels), positive("input_size", input_size), input_size)
        super().__init__(
            num_classes=num_classes,
            input_shape=(encoding.time_steps, *image) if encoding.frames else image,
            time_steps=encoding.time_steps if spiking else 1,
            spiking=spiking,
            domain=encoding.domain,
        )
        self.encoding = encoding
        self.register_buffer("mean", _per_channel("mean", mean, in_channels))
        self.register_buffer("std", _per_channel("std", std, in_channels))
        if bool((self.std <= 0).any()):
            raise ValueError(f"std must be above 0, got {std}")
        if encoding.frames and (bool((self.mean != 0).any()) or bool((self.std != 1).any())):
            raise ValueError(
                f"frames of events are not normalised (an empty cell stays 0), but mean={mean} and std={std}; leave them "
                "out: batch normalisation scales what follows"
            )

    def check_input(self, x: Tensor) -> None:
        """Raise an error that says what is wrong, also where frames of events come to a network for images."""
        size = self.input_shape[1:]
        if (
            isinstance(x, Tensor)
            and x.dim() == 5
            and len(size) == 2
            and (x.shape[3] == x.shape[4] or x.shape[3:] == size)
        ):
            raise ValueError(
                f"{type(self).__name__} was built for images (B, C, H, W), got {tuple(x.shape)}, as frames of events have: "
                "give it encoding=Frames(), on the command line --model.backbone.encoding=Frames"
            )
        super().check_input(x)

    def encode(self, x: Tensor) -> Tensor:
        """Turn an input (B, *input_shape) into a sequence (T, B, C, H, W).

        Images are normalised first; spikes and frames are not. The ANN twin gets one step.
        """
        sequence = self.encoding((x - self.mean) / self.std if self.encoding.constant else x)
        return sequence if self.spiking else sequence.sum(0, keepdim=True)


def halvings(name: str, input_size: int, times: int) -> int:
    """Return the side that ``times`` poolings by 2 leave; an odd side loses its last row and column.

    Raises:
        ValueError: if nothing is left.
    """
    side = input_size >> times
    if side < 1:
        raise ValueError(
            f"{name} halves the image {times} times, so input_size must be at least {2**times}, got {input_size}; pad "
            "the images, or choose a network with fewer poolings"
        )
    return side
