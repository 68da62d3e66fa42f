"""Write what a network says about each sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from torch import distributed as dist

from sg_lightning.evaluation.rows import write_atomically
from sg_lightning.evaluation.session import process


class PredictionWriter(BasePredictionWriter):
    """Write the logits of ``trainer.predict`` as a CSV file, one line per sample, in the order of the data.

    Columns: ``id`` (index in the data set), ``prediction`` (class of the largest logit), ``logit_0``, ``logit_1``, ...
    Works on any number of processes.

    Args:
        path: The file.

    Raises:
        OSError: if the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__("epoch")
        self.path = Path(path)

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Gather the logits of all processes and write them."""
        ids = [k for batches in batch_indices for batch in batches for k in batch]
        mine = dict(zip(ids, torch.cat(list(predictions)).float().cpu(), strict=True))
        rank, world = process()
        shares: list[Any] = [mine]
        if world > 1:
            shares = [None] * world
            dist.all_gather_object(shares, mine)
        if rank == 0:
            self._write({k: row for share in shares for k, row in share.items()})

    def _write(self, logits: dict[int, Tensor]) -> None:
        classes = len(next(iter(logits.values())))
        lines = [",".join(["id", "prediction", *(f"logit_{k}" for k in range(classes))])]
        for k in sorted(logits):
            # Nine digits tell any two float32 numbers apart.
            lines.append(",".join([str(k), str(int(logits[k].argmax())), *(f"{z:.9g}" for z in logits[k].tolist())]))
        try:
            write_atomically(self.path, "\n".join(lines) + "\n")
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error.strerror or error}; choose another out=") from error
