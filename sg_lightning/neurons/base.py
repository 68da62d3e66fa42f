"""What all spiking neurons share: the dynamics' options, checked parameters, the gradient rule."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from sg_lightning.neurons import surrogates
from sg_lightning.neurons.surrogates import Surrogate
from sg_lightning.recipes import Recorded

if TYPE_CHECKING:
    from sg_lightning.neurons.rules import BackwardRule

Reset = Literal["zero", "subtract", "none"]


@dataclass(frozen=True)
class Dynamics:
    """How a neuron fires and resets; the fields are those of :class:`~sg_lightning.neurons.LIF`.

    Attributes:
        code: The same as a string, e.g. ``"subtract+reset_delay"``, for operators, which take plain values only.
    """

    code: ClassVar[str]

    reset: Reset = "zero"
    reset_delay: bool = False
    detach_reset: bool = False
    fire_at_threshold: bool = False

    def __post_init__(self) -> None:
        if self.reset not in get_args(Reset):
            raise ValueError(f"unknown reset {self.reset!r}; choose one of {', '.join(get_args(Reset))}")
        flags = [field.name for field in fields(self)[1:] if getattr(self, field.name)]
        # Not a property: torch.compile reads a string that is there.
        object.__setattr__(self, "code", "+".join([self.reset, *flags]))

    @staticmethod
    @functools.cache
    def of_code(code: str) -> Dynamics:
        """Return the dynamics of a ``code``."""
        reset, *flags = code.split("+")
        return Dynamics(reset, **dict.fromkeys(flags, True))  # type: ignore[arg-type]

    @property
    def subtracts_late(self) -> bool:
        """Whether a spike lowers the membrane of the next step instead of its own."""
        return self.reset == "subtract" and self.reset_delay


class SpikingNeuron(Recorded, nn.Module):
    """Base of every module whose backward pass uses a surrogate gradient.

    Attributes:
        surrogate: The rule that training uses; ``None`` where the module has several of its own.
        attack_rule: What replaces ``surrogate`` in the backward pass while it is not ``None``: another surrogate, or
            a :class:`~sg_lightning.neurons.BackwardRule`. Attacks set it for the time they run. The forward pass
            does not depend on it.
        slopes_only: Whether the module can follow rules that change slopes, and no others.
    """

    surrogate: Surrogate | None = None
    attack_rule: Surrogate | BackwardRule | None = None
    slopes_only: ClassVar[bool] = False

    @property
    def gradient_rule(self) -> Surrogate:
        """The surrogate in force now, for the passes that a :class:`~sg_lightning.neurons.BackwardRule` leaves alone."""
        rule = self.attack_rule if isinstance(self.attack_rule, Surrogate) else self.surrogate
        if rule is None:
            raise ValueError(f"{type(self).__name__} has no surrogate; set its attribute `surrogate`")
        return rule


def resolve_surrogate(surrogate: Surrogate | str) -> Surrogate:
    """Return the surrogate itself, or the one of that name with its default width."""
    if isinstance(surrogate, str):
        return surrogates.from_name(surrogate)
    if not isinstance(surrogate, Surrogate):
        raise ValueError(  # noqa: TRY004 - every bad argument is a ValueError here
            f"surrogate must be a Surrogate such as surrogates.Triangular(1.0) or one of the names "
            f"{', '.join(sorted(surrogates.SURROGATES))}, got {surrogate!r}"
        )
    return surrogate


def checked_parameter(name: str, value: float | Tensor, channels: int | None, *, high: float = math.inf) -> Tensor:
    """Return ``value`` as a new tensor, scalar or one entry per channel, after checking it.

    Args:
        name: ``"beta"`` (allowed 0 to ``high``) or ``"threshold"`` (allowed above 0), for rule and message.
        value: A number or a 1-d tensor.
        channels: Size that a vector must have; a number is repeated that often. ``None``: as given.
        high: Largest legal value.
    """
    if channels is not None and (isinstance(channels, bool) or not isinstance(channels, int) or channels < 1):
        raise ValueError(f"channels must be a whole number above 0 or None, got {channels!r}")
    tensor = torch.as_tensor(value).detach().clone()
    if not tensor.is_floating_point():
        tensor = tensor.to(torch.get_default_dtype())
    if tensor.dim() > 1:
        raise ValueError(
            f"{name} must be a number or a 1-d tensor with one value per channel, got shape {tuple(tensor.shape)}"
        )
    if channels is not None and tensor.dim() == 0:
        tensor = tensor.repeat(channels)
    if tensor.dim() == 1 and channels is not None and tensor.numel() != channels:
        raise ValueError(f"{name} has {tensor.numel()} values but channels={channels}; give one value per channel")
    if tensor.numel() == 0:
        raise ValueError(f"{name} is empty; give a number or one value per channel")
    if name == "threshold":
        legal, rule = (tensor > 0) & torch.isfinite(tensor), "finite and above 0"
    else:
        legal, rule = (tensor >= 0) & (tensor <= high), f"in [0, {high:g}]"
    if not bool(legal.all()):
        bad = tensor[~legal] if tensor.dim() else tensor.reshape(1)
        raise ValueError(f"{name} must be {rule}, got {bad[0].item():g}")
    return tensor


def check_sequence(x: Tensor, layer: str, *, rank: int | None = None) -> None:
    """Refuse an input that is no float tensor (T, B, ...), of exactly ``rank`` dimensions where given."""
    shape = tuple(x.shape)
    if rank is not None and x.dim() != rank:
        raise ValueError(f"{layer} needs time first: an input of {rank} dimensions (T, B, N), got shape {shape}")
    if x.dim() < 2:
        raise ValueError(f"{layer} needs time first: an input (T, B, ...), got shape {shape}")
    if x.shape[0] == 0:
        raise ValueError(f"{layer} needs at least one time step, got shape {shape}")
    if not x.is_floating_point():
        raise ValueError(f"{layer} needs a floating-point input, got {x.dtype}; convert it with .float()")


def compute_dtype(x: Tensor) -> torch.dtype:
    """Precision of the membrane: float64 for float64 inputs, else float32, under autocast too."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
