"""Turn an input (B, ...) into a sequence (T, B, ...) for a spiking network; frames of events are one already.

Every encoding is differentiable, because attacks and gradient penalties need
the gradient at the input: exactly (:class:`Direct`), or with a straight-through
estimate that is stated and tested (:class:`Poisson`, :class:`Latency`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from sg_lightning.domains import Box, Counts, Domain
from sg_lightning.recipes import Recorded


class Encoding(Recorded, nn.Module, ABC):
    """Base of all encodings: (B, ...) to (T, B, ...).

    Args:
        time_steps: Number of steps T, at least 1.

    Attributes:
        constant: The input itself appears at every step. A backbone then normalises it and computes everything up
            to the first neuron once for all T. Otherwise the output is spikes, which are not normalised.
        stochastic: Two calls with the same input differ, also in evaluation mode.
        frames: The input brings its own time axis, (B, T, ...).
        domain: Legal values of the input.

    Raises:
        ValueError: if ``time_steps`` is below 1.
    """

    constant: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False
    frames: ClassVar[bool] = False
    domain: ClassVar[Domain] = Box()

    def __init__(self, time_steps: int) -> None:
        super().__init__()
        if isinstance(time_steps, bool) or not isinstance(time_steps, int) or time_steps < 1:
            raise ValueError(f"time_steps must be an integer >= 1, got {time_steps!r}")
        self.time_steps = time_steps

    def fitted(self, time_steps: int | None, default: int) -> Encoding:
        """Return this encoding for a network that was asked for ``time_steps``, or for none in particular.

        Raises:
            ValueError: if the two disagree.
        """
        if time_steps is not None and time_steps != self.time_steps:
            raise ValueError(
                f"time_steps={time_steps} but the encoding has time_steps={self.time_steps}; give one of the two"
            )
        return self

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Encode x (B, ...) as (T, B, ...)."""

    def extra_repr(self) -> str:
        """Show the number of steps."""
        return f"time_steps={self.time_steps}"


class Direct(Encoding):
    """Repeat the input at every step; the first layer then learns the code.

    The result is a view (``expand``), so no memory is spent.

    Args:
        time_steps: Number of steps T, at least 1.

    Shape:
        (B, ...) to (T, B, ...).

    Source:
        Rueckauer et al., "Conversion of continuous-valued deep networks to efficient event-driven networks for
        image classification", Frontiers in Neuroscience 2017 (analogue input currents); the encoding of the
        sparse-gradient paper, arXiv 2405.20355.
    """

    constant = True

    def forward(self, x: Tensor) -> Tensor:
        """Repeat x (B, ...) as (T, B, ...)."""
        return x.unsqueeze(0).expand(self.time_steps, *x.shape)


class Poisson(Encoding):
    """Draw a spike with probability x at every step and element (rate code).

    Inputs are meant to be in [0, 1]; what lies outside counts as the nearest bound. The draws come from torch's
    global generator of the device, in evaluation mode too.

    The gradient is straight-through: that of the expected spike clip(x, 0, 1), i.e. 1 inside the closed interval
    and 0 outside, at every step, whatever was drawn.

    Args:
        time_steps: Number of steps T, at least 1.

    Shape:
        (B, ...) to spikes in {0, 1} (T, B, ...).

    Source:
        The Bernoulli approximation of a Poisson process, as ``snntorch.spikegen.rate`` draws it (whose gradient is
        zero); straight-through: Bengio, Léonard, Courville, arXiv 1308.3432.
    """

    stochastic = True

    def forward(self, x: Tensor) -> Tensor:
        """Draw spikes (T, B, ...) from rates x (B, ...)."""
        rate = x.clamp(0.0, 1.0)
        noise = torch.rand((self.time_steps, *x.shape), dtype=x.dtype, device=x.device)
        # rand < rate is never true at 0 and always at 1. The second term is exactly zero and only carries the gradient.
        return noise.lt_(rate.detach()) + (rate - rate.detach())


class Latency(Encoding):
    """Spike once per element, the earlier the brighter; dark elements stay silent.

    The spike falls on step k(x) = round((1 - x) T), counted from 0; k = T means no spike. So T steps tell T + 1
    intensities apart. Inputs are meant to be in [0, 1]; what lies outside counts as the nearest bound.

    The gradient is straight-through: brightening x by 1/T moves the spike one step ahead, so with upstream gradient
    g_t (and g_T = 0 for "no spike") dL/dx = T (g_{k-1} - g_{k+1}) / 2, the central difference over one step either
    way; one-sided T (g_0 - g_1) and T g_{T-1} at the two ends. It is 0 for x outside [0, 1].

    Args:
        time_steps: Number of steps T, at least 1.

    Shape:
        (B, ...) to spikes in {0, 1} (T, B, ...), at most one per element.

    Source:
        Linear intensity-to-latency coding, Kheradpisheh and Masquelier, arXiv 1910.09495 (S4NN); here rounded to
        the nearest step instead of down, and with the slot "no spike" for the darkest level.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Place the spikes (T, B, ...) of intensities x (B, ...)."""
        last = self.time_steps
        bright = x.clamp(0.0, 1.0)
        step = ((1.0 - bright.detach()) * last).round()
        time = torch.arange(last, dtype=x.dtype, device=x.device).view(-1, *[1] * x.dim())
        ahead, behind = (step - 1).clamp_min(0.0), (step + 1).clamp_max(last)
        slope = ((time == ahead).to(x.dtype) - (time == behind).to(x.dtype)) * (last / (behind - ahead))
        # The second term is exactly zero and only carries the gradient.
        return (time == step).to(x.dtype) + slope * (bright - bright.detach())


class Frames(Encoding):
    """Show frames of events one after the other: step t sees frame t.

    With it an image network takes (B, T, C, H, W), counts of events in C polarities, in place of (B, C, H, W).

    Args:
        time_steps: Number of frames T, at least 1; ``None`` for what the network is asked for, as when it comes from
            the data.

    Shape:
        (B, T, ...) to (T, B, ...), a view.

    Raises:
        ValueError: in the forward pass, if the input has another number of frames.
    """

    frames = True
    domain = Counts()

    def __init__(self, time_steps: int | None = None) -> None:
        super().__init__(1 if time_steps is None else time_steps)
        self.open = time_steps is None

    def fitted(self, time_steps: int | None, default: int) -> Encoding:
        """Return frames of the network's number of steps, if none was given."""
        if not self.open:
            return super().fitted(time_steps, default)
        return Frames(default if time_steps is None else time_steps)

    def forward(self, x: Tensor) -> Tensor:
        """Move the time axis of frames x (B, T, ...) to the front."""
        if x.dim() < 2 or (x.shape[1] != self.time_steps and not self.open):
            raise ValueError(f"Frames needs inputs of shape (B, {self.time_steps}, ...), got {tuple(x.shape)}")
        return x.transpose(0, 1)
