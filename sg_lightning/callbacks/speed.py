"""Settings of memory that make training and attacks faster on some machines."""

from __future__ import annotations

import ctypes
import logging
import platform

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

_log = logging.getLogger(__name__)
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # malloc.h of glibc


class ChannelsLast(Callback):
    """Keep the weights of convolutions, and with them all images, with channels last in memory.

    The function stays the same up to rounding, and so do checkpoints. GPUs with bfloat16 and CPUs with networks for event
    frames gain from it, VGG in float32 on a CPU loses: measure, see ``docs/performance.md``.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Change the layout of four-dimensional weights and buffers, in place."""
        for value in (*pl_module.parameters(), *pl_module.buffers()):
            if value.dim() == 4:
                value.data = value.data.contiguous(memory_format=torch.channels_last)


class KeepFreedMemory(Callback):
    """Let the process keep memory that tensors give back, instead of returning it to the system.

    glibc, the C library of most Linux systems, returns tensors of 32 MB and more at once, and every new one is then made of pages
    that the system zeroes first; on a CPU that can take longer than the network. With this the process reuses them and stays
    as large as it has been at most. It does what the variables ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647``
    do, holds until the process ends, and does nothing, but says so, on systems without glibc.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the C library."""
        problem = keep_freed_memory()
        if problem:
            _log.warning("KeepFreedMemory does nothing here: %s", problem)


def keep_freed_memory() -> str:
    """Do what :class:`KeepFreedMemory` does; say why not, or nothing."""
    if platform.libc_ver()[0] != "glibc":
        return f"it is for glibc (Linux), this is {platform.platform()}"
    library = ctypes.CDLL(None)
    done = library.mallopt(_MMAP_MAX, 0) and library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    return "" if done else "mallopt refused"
