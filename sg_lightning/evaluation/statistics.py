"""Intervals of shares and of paired differences."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054  # 97.5 % quantile of the standard normal


def wilson(right: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson, JASA 22, 1927)."""
    if total == 0:
        return 0.0, 1.0
    p = right / total
    middle = (p + Z * Z / (2 * total)) / (1 + Z * Z / total)
    half = Z * math.sqrt(p * (1 - p) / total + Z * Z / (4 * total * total)) / (1 + Z * Z / total)
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_difference(
    a: NDArray[np.bool_], b: NDArray[np.bool_], *, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Return mean(a) - mean(b) over the same samples with its 95 % bootstrap interval (samples drawn in pairs)."""
    if a.shape != b.shape:
        raise ValueError(f"paired samples need equal shapes, got {a.shape} and {b.shape}")
    difference = a.astype(float) - b.astype(float)
    index = np.random.default_rng(seed).integers(0, len(difference), size=(draws, len(difference)))
    low, high = np.quantile(difference[index].mean(1), [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)
