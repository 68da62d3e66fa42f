"""What a threat model is: data that says which perturbations are allowed."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self  # typing has it from Python 3.11

from sg_lightning.domains import Domain
from sg_lightning.inputs import Input, batch_size, device_of
from sg_lightning.recipes import Storable
from sg_lightning.sampling import SampleGenerator

TOLERANCE = 1e-6  # relative, for float32 budgets


def is_share(eps: float | str) -> bool:
    """Tell whether a budget is a share of each sample's events, such as ``"2%"``."""
    return isinstance(eps, str) and eps.rstrip().endswith("%")


def parse_eps(eps: float | str, owner: str = "eps", *, shares: bool = True) -> float:
    """Read a budget: a number, an exact ratio such as ``"8/255"``, or a share such as ``"2%"`` (gives 0.02).

    Args:
        eps: What to read.
        owner: What it belongs to, for the message.
        shares: Whether a share of the sample's events has a meaning there.

    Raises:
        ValueError: if it is no number, not finite, negative, or a share where that has no meaning.
    """
    if is_share(eps) and not shares:
        raise ValueError(f"{owner} cannot be a share of the sample's events: give a number or a ratio, got {eps!r}")
    try:
        value = float(_exact(eps)) if isinstance(eps, str) else float(eps)
    except (ValueError, ZeroDivisionError, TypeError) as error:
        raise ValueError(f"{owner} must be a number or a ratio like '8/255', got {eps!r}") from error
    if not 0.0 <= value < float("inf"):
        raise ValueError(f"{owner} must be finite and >= 0, got {eps!r}")
    return value


def _exact(eps: str) -> Fraction:
    return Fraction(eps.rstrip()[:-1]) / 100 if is_share(eps) else Fraction(eps)


def metric_key(norm: str, eps: float | str) -> str:
    """Write norm and budget as a metric-safe name, e.g. ``linf_8_255``, ``l2_0p5`` or ``flips_2pct``."""
    return f"{norm}_{re.sub(r'[^A-Za-z0-9_-]', '_', str(eps).replace('.', 'p').replace('%', 'pct'))}"


@Storable.register
@dataclass(frozen=True)
class Threat(ABC):
    """The perturbations an attacker may make. Subclasses are frozen: data, not code of an attack.

    Args:
        eps: Budget in the units of the norm and of the input; a ratio such as ``"8/255"`` is kept verbatim.
        domain: Legal values of the input.
    """

    eps: float | str
    domain: Domain = field(default_factory=Domain)
    norm: ClassVar[str]
    discrete: ClassVar[bool] = False  # True: steps jump to the best vertex and have no step size
    shares: ClassVar[bool] = False  # True: eps may be a share of the sample's events
    relaxed: ClassVar[bool] = False  # True: values between the legal ones, a diagnostic that no sensor can produce

    def __post_init__(self) -> None:
        parse_eps(self.eps, f"eps of {type(self).__name__}", shares=self.shares)

    @property
    def budget(self) -> float:
        """``eps`` as a number; what it allows a sample is in :meth:`limits`."""
        return parse_eps(self.eps)

    @property
    def key(self) -> str:
        """Metric-safe name, e.g. ``linf_8_255``, ``l2_0p5`` or ``flips_2pct``."""
        return metric_key(self.norm, self.eps)

    def limits(self, x: Input) -> Tensor:
        """Return the largest size that each sample allows, float64 (B,)."""
        return torch.full((batch_size(x),), self.budget, dtype=torch.float64, device=device_of(x))

    def check(self, x: Input) -> None:  # noqa: B027 - most threats know at construction
        """Raise ``ValueError`` if the budget is larger than anything that inputs like ``x`` allow."""

    @abstractmethod
    def project(self, x_adv: Input, x: Input) -> Input:
        """Return the nearest allowed point to ``x_adv`` (Euclidean): in the budget and in the domain."""

    @abstractmethod
    def random_start(self, x: Input, generator: SampleGenerator) -> Input:
        """Return a random allowed point, the start of an attack."""

    @abstractmethod
    def sample(self, x: Input, generator: SampleGenerator) -> Input:
        """Return the random-perturbation control: full budget, no knowledge of the model."""

    @abstractmethod
    def steepest_step(self, x_adv: Input, grad: Input, x: Input, step_size: float) -> Input:
        """Take one ascent step of length ``step_size`` (in this norm) from ``x_adv``; not yet projected."""

    @abstractmethod
    def maximise_linear(self, x: Input, grad: Input) -> Input:
        """Return the allowed point that maximises ``<grad, x_adv>`` (exact in ball and domain)."""

    @abstractmethod
    def size(self, x_adv: Input, x: Input) -> Tensor:
        """Return the size of the perturbation in this norm, (B,)."""

    @abstractmethod
    def contains(self, x_adv: Input, x: Input) -> Tensor:
        """Tell per sample, bool (B,), whether ``x_adv`` is finite, in budget (1e-6 relative) and in the domain."""

    def includes(self, other: Threat) -> bool:
        """Tell whether this is a threat on several modalities that allows all that ``other``, on one of them, does."""
        return False

    def default_step(self, steps: int, done: int = 0) -> float:
        """Return the length of step number ``done`` of ``steps``: any point of the ball can be reached and left again."""
        return 2.5 * self.budget / steps

    def with_eps(self, eps: float | str) -> Self:
        """Return the same threat with another budget."""
        return replace(self, eps=eps)

    def describe(self) -> dict[str, Any]:
        """Return plain data that identifies this threat (for hashes, tables and reports)."""
        return {"norm": self.norm, "eps": str(self.eps), "domain": str(self.domain)}


class SingleThreat(Threat):
    """A threat on one tensor (B, ...): the checks that all norms share."""

    @abstractmethod
    def _size(self, change: Tensor) -> Tensor:
        """Measure a float64 change (B, n)."""

    def limits(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the budget of each sample, float64 (B,); a share is exact and rounded down to whole events."""
        if not is_share(self.eps):
            return super().limits(x)
        share = _exact(str(self.eps))
        return (self._events(x) * share.numerator // share.denominator).double()

    def _events(self, x: Tensor) -> Tensor:
        """Count what a share refers to, int64 (B,): events."""
        return x.double().flatten(1).sum(1).long()

    def size(self, x_adv: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the size of the perturbation, float64 (B,)."""
        return self._size((x_adv.double() - x.double()).flatten(1))

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        """Check finiteness, budget (1e-6 relative) and domain per sample."""
        inside = torch.isfinite(x_adv).flatten(1).all(1) & self.domain.contains(x_adv)
        return inside & (self.size(x_adv, x) <= self.limits(x) * (1 + TOLERANCE))

    def _room(self, x: Tensor, direction: Tensor) -> Tensor:
        """Return the distance (B, n) from ``x`` to the wall that ``direction`` (B, n) points at."""
        flat = x.double().flatten(1)
        return torch.where(direction > 0, self.domain.high - flat, flat - self.domain.low).clamp_min(0.0)
