"""Train with less memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from sg_lightning.backbones.base import OverTime, checked_recompute, recompute
from sg_lightning.backbones.recomputation import Recompute
from sg_lightning.neurons import compact_spikes


class SaveMemory(Callback):
    """Keep less between the forward and the backward pass of training.

    Losses and gradients stay what they are (with a number of steps: up to rounding). Works on any LightningModule; ``recompute`` needs a network of this library inside. See
    :class:`~sg_lightning.neurons.compact_spikes` and :func:`~sg_lightning.backbones.recompute`; what it saves and costs is
    measured in ``benchmarks/results/memory.md``.

    Args:
        spikes: Whether spikes are kept in a byte each instead of four.
        recompute: What the backward pass computes again: ``"norms"``, ``"blocks"``, a number of steps, or ``None``.

    Raises:
        ValueError: An unknown ``recompute``; at the start of training a module that has nothing to recompute.
    """

    def __init__(self, *, spikes: bool = True, recompute: Recompute | None = None) -> None:
        super().__init__()
        self.spikes = spikes
        self.recompute = checked_recompute(recompute)
        self._step = ExitStack()
        self._before: dict[OverTime, Recompute | None] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose what is recomputed."""
        self._release()
        if self.recompute is not None:
            before = {part: part.recompute for part in pl_module.modules() if isinstance(part, OverTime)}
            recompute(pl_module, self.recompute)
            self._before = before

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Pack what this step saves, but for the batch, which is there anyway."""
        self._step.close()  # of a step that another callback skipped
        if self.spikes:
            self._step.enter_context(compact_spikes(_tensors(batch)))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop packing."""
        self._step.close()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop packing, where the last step was skipped."""
        self._step.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was, also after an error or an interrupt."""
        self._release()

    def _release(self) -> None:
        self._step.close()
        for part, what in self._before.items():
            part.recompute = what
        self._before = {}


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (list, tuple, Mapping)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)
