"""Random numbers that belong to a sample, not to a batch.

Evaluation must not depend on batch size, order, early drop, restarts or the
number of processes, so the noise of a sample is a pure function of (run seed,
sample id, purpose). A counter-based generator (the splitmix64 finaliser over
key and counter) gives that without one generator object per sample, equally on
every device. A leaf that every room may import.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014 (the finaliser's constants).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """Write an unsigned 64-bit constant as the int64 that torch accepts."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift logically: int64 in torch shifts arithmetically."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


class SampleGenerator:
    """Draws noise per sample from 64-bit keys (B,), one per sample.

    Immutable: the same call gives the same numbers; use :meth:`fork` to get independent streams.

    Args:
        keys: int64 (B,), one key per sample.
    """

    def __init__(self, keys: Tensor) -> None:
        if keys.dtype != torch.int64 or keys.dim() != 1:
            raise ValueError(f"keys must be int64 of shape (B,), got {keys.dtype} of shape {tuple(keys.shape)}")
        self.keys = keys

    @classmethod
    def from_ids(cls, seed: int, ids: Tensor | Sequence[int]) -> SampleGenerator:
        """Key every sample by the run's seed and its id (the index in the data set)."""
        ids = torch.as_tensor(ids, dtype=torch.int64)
        return cls(_mix(_mix(ids * _GOLDEN + 1) + _signed(seed * 0x9E3779B97F4A7C15)))

    @classmethod
    def draw(cls, size: int, generator: torch.Generator | None = None) -> SampleGenerator:
        """Draw ``size`` keys from ``generator`` (torch's global one if ``None``)."""
        return cls(torch.randint(-(2**63), 2**63 - 1, (size,), dtype=torch.int64, generator=generator))

    def fork(self, *purpose: int | str) -> SampleGenerator:
        """Give an independent stream for a purpose, e.g. ``fork("restart", 2)``."""
        keys = self.keys
        for part in purpose:
            tag = zlib.crc32(part.encode()) + (1 << 40) if isinstance(part, str) else part
            keys = _mix(keys + _signed((tag + 1) * 0xD1B54A32D192ED03))
        return SampleGenerator(keys)

    def select(self, index: Tensor) -> SampleGenerator:
        """Keep the samples of ``index``."""
        return SampleGenerator(self.keys[index.to(self.keys.device)])

    def __len__(self) -> int:
        return self.keys.shape[0]

    def _bits(self, count: int, device: torch.device) -> Tensor:
        counter = torch.arange(1, count + 1, dtype=torch.int64, device=device) * _GOLDEN
        return _mix(self.keys.to(device).unsqueeze(1) + counter)

    def uniform(self, like: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Draw U[low, high) in the shape, dtype and device of ``like`` (B, ...)."""
        bits = _shift_right(self._bits(like[0].numel(), like.device), 11)
        unit = (bits.double() * 2.0**-53).view(like.shape)
        return (low + (high - low) * unit).to(like.dtype)

    def normal(self, like: Tensor) -> Tensor:
        """Draw N(0, 1) in the shape, dtype and device of ``like`` (B, ...)."""
        wide = like.double() if like.dtype != torch.float64 else like
        first = self.fork("normal", 0).uniform(wide).clamp_min(2.0**-53)
        second = self.fork("normal", 1).uniform(wide)
        return ((-2.0 * first.log()).sqrt() * (2.0 * math.pi * second).cos()).to(like.dtype)


def as_sample_generator(generator: SampleGenerator | torch.Generator | None, size: int) -> SampleGenerator:
    """Accept either kind of generator; ``None`` draws keys from torch's global one."""
    if isinstance(generator, SampleGenerator):
        if len(generator) != size:
            raise ValueError(f"the generator has keys for {len(generator)} samples, the batch has {size}")
        return generator
    return SampleGenerator.draw(size, generator)
