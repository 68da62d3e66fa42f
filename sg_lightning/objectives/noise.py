"""Evaluate a stochastic network at several points with the same random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class NoiseTape:
    """Remembers the random state, so that a later forward pass draws the same dropout masks and spike trains.

    A difference of two passes with fresh noise each, divided by a small step, would be noise and nothing else.

    Args:
        device: Where the network runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu, self._cuda = self._now()

    def _now(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        return torch.get_rng_state(), cuda

    def _restore(self, cpu: torch.Tensor, cuda: torch.Tensor | None) -> None:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self._device)

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Run the block with the remembered random state; afterwards the stream goes on as if it had not run."""
        now = self._now()
        self._restore(self._cpu, self._cuda)
        try:
            yield
        finally:
            self._restore(*now)
