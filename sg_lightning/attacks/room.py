"""How many samples go through the model at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from sg_lightning.inputs import Input, apply, batch_size, device_of, select

T = TypeVar("T")

# Rows up to which a batch costs hardly more than a single sample, so that other runs and estimators may go along.
_CHEAP = {"cpu": 32, "cuda": 256}


def cheap(device: torch.device) -> int:
    """Return the number of rows up to which a batch costs hardly more than a single one."""
    return _CHEAP.get(device.type, 1)


@dataclass
class Room:
    """The largest number of samples that fits: a given one at first, half as many each time that memory runs out.

    Args:
        samples: Samples at once, at least 1; ``None``: all.
    """

    samples: int | None = None
    alone: bool = False  # a neuron of the model sees other samples than the model: estimators do not go side by side

    def chunks(self, x: Input, evaluate: Callable[[Input, Tensor], T], *, fixed: bool = False) -> list[T]:
        """Evaluate ``x`` part by part, ``evaluate(part, index)``, and return what came of each.

        A part that does not fit is cut in two and tried again, unless the size is ``fixed``; the size that fitted is kept for
        the calls to come.

        Raises:
            RuntimeError: torch's own, if memory runs out with a single sample.
        """
        size, start, found = batch_size(x), 0, []
        everyone = torch.arange(size, device=device_of(x))
        while start < size:
            count = min(self.samples or size, size - start)
            index = everyone[start : start + count]
            try:
                found.append(evaluate(x if count == size else select(x, index), index))
            except RuntimeError as error:
                if fixed or count == 1 or not _out_of_memory(error):
                    raise
                self.samples = (count + 1) // 2
            else:
                start += count
                continue
            if torch.cuda.is_available():  # outside the handler, whose error still holds the failed pass
                torch.cuda.empty_cache()
        return found


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def rounded_up(x: Input) -> Input:
    """Repeat the first sample until there are 1, 2, 4, 8, ... samples.

    A compiled model, or one captured in CUDA graphs, is built anew for every batch size: as samples break, an attack
    would ask it for all sizes there are. This leaves a few.
    """
    missing = (1 << (batch_size(x) - 1).bit_length()) - batch_size(x)
    return apply(lambda t: torch.cat([t, t[:1].expand(missing, *t.shape[1:])]), x) if missing else x
