"""The set of values a clean input may take: box, event counts, binary spikes.

A leaf that every room may import. Inputs live in their natural domain and
normalisation happens inside the model, so a budget is always in input units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from sg_lightning.recipes import Storable

Lattice = Literal["binary", "count"]


@Storable.register
@dataclass(frozen=True)
class Domain:
    """A box, optionally restricted to its integer points.

    Attributes:
        low: Smallest legal value.
        high: Largest legal value; ``inf`` for counts without a ceiling.
        lattice: ``"binary"`` or ``"count"`` when only integers are physical, else ``None``.
    """

    low: float = 0.0
    high: float = 1.0
    lattice: Lattice | None = None

    def __post_init__(self) -> None:
        if math.isnan(self.low) or math.isnan(self.high) or not self.low < self.high:
            raise ValueError(f"a domain needs low < high, got low={self.low}, high={self.high}")

    @property
    def width(self) -> float:
        """Distance between the walls (``inf`` for open counts)."""
        return self.high - self.low

    def clip(self, x: Tensor) -> Tensor:
        """Clip to the walls (integers are not rounded)."""
        return x.clamp(self.low, None if math.isinf(self.high) else self.high)

    def contains(self, x: Tensor, tolerance: float = 0.0) -> Tensor:
        """Tell, per sample of ``x`` (B, ...), whether every value is legal. Returns bool (B,)."""
        ok = torch.isfinite(x) & (x >= self.low - tolerance) & (x <= self.high + tolerance)
        if self.lattice is not None:
            ok &= (x - x.round()).abs() <= tolerance
        return ok.flatten(1).all(1)

    def check(self, x: Tensor, name: str = "x") -> None:
        """Raise ``ValueError`` with the cure if a value of ``x`` is not legal."""
        if not x.is_floating_point():
            raise ValueError(f"{name} has dtype {x.dtype}; convert it to float32 with .float() first")
        finite = torch.isfinite(x)
        if not bool(finite.all()):
            bad = int((~finite).sum())
            raise ValueError(f"{name} holds {bad} NaN or infinite values; clean the data before training or attacking")
        low, high = float(x.min()), float(x.max())
        if low < self.low or high > self.high:
            raise ValueError(
                f"{name} has values in [{low:.4g}, {high:.4g}] but its domain is {self}. Give inputs in their "
                "natural units and normalise inside the model (backbone arguments mean=..., std=...), or pass "
                "the domain that the data really has."
            )
        if self.lattice is not None and bool((x != x.round()).any()):
            raise ValueError(f"{name} has values that are not integers but its domain is {self}")

    def __str__(self) -> str:
        if self.lattice == "binary":
            return "Binary {0, 1}"
        if self.lattice == "count":
            return f"Counts {{0, ..., {self.high:g}}}"
        return f"Box [{self.low:g}, {self.high:g}]"


class Box(Domain):
    """Real values between two walls, [0, 1] for images."""

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__(float(low), float(high), None)


class Counts(Domain):
    """Non-negative integer event counts, without a ceiling unless one is given."""

    def __init__(self, high: float = math.inf) -> None:
        super().__init__(0.0, float(high), "count")


class Binary(Domain):
    """Spike rasters in {0, 1}."""

    def __init__(self) -> None:
        super().__init__(0.0, 1.0, "binary")


Domains: TypeAlias = Domain | dict[str, Domain]


def check_values(x: Tensor | Mapping[str, Tensor], domain: Domains | None, name: str = "x") -> None:
    """Check a tensor against its domain, or each modality of a dictionary against its own.

    Args:
        x: Inputs (B, ...).
        domain: Legal values; ``None``, and a modality without one: any finite values.
        name: What the values are called in an error.

    Raises:
        ValueError: on values that are not legal, or a dictionary that lacks a modality of the domain.
    """
    anything = Domain(-math.inf, math.inf)
    if isinstance(x, Tensor):
        if isinstance(domain, dict):
            raise ValueError(f"{name} is a single tensor, but its domain is by modality: {domains_text(domain)}")  # noqa: TRY004
        (anything if domain is None else domain).check(x, name)
        return
    if isinstance(domain, dict) and not domain.keys() >= x.keys():
        raise ValueError(f"{name} has the modalities {', '.join(x)}, but its domain names {', '.join(domain)}")
    for key, part in x.items():
        legal = domain.get(key) if isinstance(domain, dict) else None
        (anything if legal is None else legal).check(part, f"{key} of {name}")


def domains_text(domain: Domains) -> str:
    """Write a domain for people: ``image: Box [0, 1], audio: Binary {0, 1}``."""
    if isinstance(domain, dict):
        return ", ".join(f"{key}: {value}" for key, value in domain.items())
    return str(domain)
