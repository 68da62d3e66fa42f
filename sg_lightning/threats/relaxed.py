"""Norm balls around events and spikes, as if values between the whole numbers were legal: a diagnostic, not a threat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sg_lightning.domains import Box
from sg_lightning.threats.base import SingleThreat
from sg_lightning.threats.norms import L1, L2, Linf

_PREFIX = "relaxed_"


def is_relaxed(norm: str) -> bool:
    """Tell by the name of a norm whether its perturbations are infeasible: no sensor can produce them."""
    return norm.startswith(_PREFIX) or f"_{_PREFIX}" in norm  # of one modality: audio_relaxed_linf


@dataclass(frozen=True)
class _Relaxed(SingleThreat):
    """Takes the walls of a domain of events and forgets that only whole numbers are legal."""

    relaxed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "domain", Box(self.domain.low, self.domain.high))
        super().__post_init__()

    def describe(self) -> dict[str, Any]:
        """Return plain data that identifies this threat, and says that it is infeasible."""
        return {**super().describe(), "infeasible": True}


@dataclass(frozen=True)
class RelaxedLinf(_Relaxed, Linf):
    """:class:`Linf` on events or spikes, with values between the whole numbers (infeasible; a diagnostic).

    Args:
        eps: Largest change of a value, input units.
        domain: Where the data live, e.g. ``Binary()`` or ``Counts()``; only its walls bind.

    Raises:
        ValueError: if eps is no number, negative or wider than the domain.
    """

    norm: ClassVar[str] = _PREFIX + Linf.norm


@dataclass(frozen=True)
class RelaxedL2(_Relaxed, L2):
    """:class:`L2` on events or spikes, with values between the whole numbers (infeasible; a diagnostic).

    Args:
        eps: Length in input units.
        domain: Where the data live, e.g. ``Binary()`` or ``Counts()``; only its walls bind.

    Raises:
        ValueError: if eps is no number or negative.
    """

    norm: ClassVar[str] = _PREFIX + L2.norm


@dataclass(frozen=True)
class RelaxedL1(_Relaxed, L1):
    """:class:`L1` on events or spikes, with values between the whole numbers (infeasible; a diagnostic).

    Args:
        eps: Sum of absolute changes in input units.
        domain: Where the data live, e.g. ``Binary()`` or ``Counts()``; only its walls bind.

    Raises:
        ValueError: if eps is no number or negative.
    """

    norm: ClassVar[str] = _PREFIX + L1.norm
