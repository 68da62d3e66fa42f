"""Shares and differences of shares, with 95 % intervals."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054  # 97.5 % quantile of the standard normal


class Share(NamedTuple):
    """A share, or a difference of two, with its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(right: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson, JASA 22, 1927)."""
    if total == 0:
        return 0.0, 1.0
    p = right / total
    middle = (p + Z * Z / (2 * total)) / (1 + Z * Z / total)
    half = Z * math.sqrt(p * (1 - p) / total + Z * Z / (4 * total * total)) / (1 + Z * Z / total)
    return max(0.0, middle - half), min(1.0, middle + half)


def share_of(right: int, total: int) -> Share:
    """Return a share with its Wilson interval."""
    return Share(right / total, *wilson(right, total))


def paired_difference(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> Share:
    """Return mean(after) - mean(before) over the same samples, in pairs, with its interval.

    Raises:
        ValueError: if the two are not about the same number of samples.

    Source:
        Agresti and Min, "Simple improved confidence intervals for comparing matched proportions", 2005 (half a sample
        added to each of the four cells).
    """
    if before.shape != after.shape:
        raise ValueError(f"paired samples need equal shapes, got {before.shape} and {after.shape}")
    gained, lost, total = int((after & ~before).sum()), int((before & ~after).sum()), len(before)
    centre = (gained - lost) / (total + 2)
    half = Z * math.sqrt(max(0.0, gained + lost + 1 - (gained - lost) ** 2 / (total + 2))) / (total + 2)
    value = (gained - lost) / total
    return Share(value, max(-1.0, min(value, centre - half)), min(1.0, max(value, centre + half)))


def independent_difference(before: Share, after: Share) -> Share:
    """Return the difference of two shares of unrelated samples, with its interval.

    Source:
        Newcombe, "Interval estimation for the difference between independent proportions", 1998, method 10, from the
        two Wilson intervals.
    """
    value = after.value - before.value
    low = value - math.hypot(after.value - after.low, before.high - before.value)
    return Share(value, low, value + math.hypot(after.high - after.value, before.value - before.low))
