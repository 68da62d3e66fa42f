"""Measure robustness while training, validating or testing any LightningModule."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor
from torch.utils.data import DistributedSampler, SequentialSampler

from sg_lightning.attacks import BPTT, Oracle, Suite, load_suite
from sg_lightning.domains import Domain
from sg_lightning.evaluation import RobustnessResult, RobustnessRun, Row
from sg_lightning.evaluation.data import check_samples
from sg_lightning.evaluation.engine import spread_ids
from sg_lightning.inputs import batch_size
from sg_lightning.threats import Budgets


class RobustnessEvaluation(Callback):
    """Attack the validation or test batches of any LightningModule and log what is left.

    The module's ``forward(x)`` must give logits (B, K) and its batches be ``(x, y)``. Works in ``fit``, ``validate``
    and ``test`` (inference mode too), batch by batch, and leaves training bit-identical to a run without it. Figures
    are logged under the names of :meth:`RobustnessResult.metrics`; the last result is in :attr:`result`.

    ``EarlyStopping`` and ``ModelCheckpoint`` see the last measured value in between: choose their patience longer than
    ``every_n_epochs``.

    Args:
        suite: ``"quick"``, ``"basic"``, the path of a YAML file, or a resolved suite.
        budgets: Budgets per norm; by default those of the data module.
        domain: Legal values; by default that of the data module, else [0, 1].
        every_n_epochs: Attack in every so many validation epochs of ``fit``.
        max_samples: Only the first so many samples; ``None``: all.
        seed: Seed of random starts and controls.
        check_samples_count: Samples on which all attacks run, for the honesty checks.
        estimator: Gradient estimator of the attacks; ``None``: the training surrogate.
        eot: Gradients averaged per step, for stochastic models.
        votes: Forward passes whose majority decides, for stochastic models.
        out: Folder for the result of every epoch and stage; ``None``: nothing is written.

    Raises:
        ValueError: on numbers out of range; at the start of a stage on missing budgets, an unknown suite or a shuffled
            loader.
    """

    def __init__(
        self,
        suite: str | Path | Suite = "quick",
        *,
        budgets: Budgets | None = None,
        domain: Domain | None = None,
        every_n_epochs: int = 1,
        max_samples: int | None = None,
        seed: int = 0,
        check_samples_count: int = 0,
        estimator: BPTT | None = None,
        eot: int = 1,
        votes: int = 1,
        out: str | Path | None = None,
    ) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be >= 1, got {every_n_epochs}")
        if max_samples is not None and max_samples < 1:
            raise ValueError(f"max_samples must be >= 1 or None, got {max_samples}")
        if check_samples_count < 0:
            raise ValueError(f"check_samples_count must be >= 0, got {check_samples_count}")
        self.suite = suite
        self.budgets = budgets
        self.domain = domain
        self.every_n_epochs = every_n_epochs
        self.max_samples = max_samples
        self.seed = seed
        self.check_samples_count = check_samples_count
        self.estimator = estimator
        self.eot = eot
        self.votes = votes
        self.out = None if out is None else Path(out)
        self.result: RobustnessResult | None = None
        self._run: RobustnessRun | None = None
        self._rows: list[Row] = []
        self._next = 0
        self._legal = Domain()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolve the suite now: a typing error should not cost an epoch."""
        self._resolve(trainer)

    def _resolve(self, trainer: Trainer) -> Suite:
        data = getattr(trainer, "datamodule", None)
        self._legal = self.domain or getattr(data, "domain", None) or Domain()
        return load_suite(self.suite, self.budgets or getattr(data, "budgets", None) or {}, self._legal)

    def _start(self, trainer: Trainer, pl_module: LightningModule, loaders: Any) -> None:
        self._run, self._rows, self._next = None, [], 0
        due = trainer.state.stage != RunningStage.VALIDATING or trainer.state.fn != "fit" or (
            (trainer.current_epoch + 1) % self.every_n_epochs == 0
        )  # fmt: skip
        if trainer.sanity_checking or not due:
            return
        loader = loaders[0] if isinstance(loaders, list | tuple) else loaders
        sampler = getattr(loader, "sampler", None)
        if not isinstance(sampler, SequentialSampler | DistributedSampler) or getattr(sampler, "shuffle", False):
            raise ValueError(
                f"RobustnessEvaluation needs the samples in their order, but the loader draws them with a "
                f"{type(sampler).__name__}: build validation and test loaders with shuffle=False"
            )
        total = len(loader.dataset)
        samples = total if self.max_samples is None else min(total, self.max_samples)
        oracle = Oracle(pl_module, estimator=self.estimator, eot=self.eot, votes=self.votes)
        checks = spread_ids(samples, self.check_samples_count)
        self._run = RobustnessRun(oracle, self._resolve(trainer), seed=self.seed, check_ids=checks)

    def _attack(self, trainer: Trainer, batch: Any, dataloader_idx: int) -> None:
        if self._run is None or dataloader_idx > 0:
            return
        if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
            raise ValueError("RobustnessEvaluation needs batches (x, y): wrap the data set so that it gives pairs")
        x, y = batch
        # Ranks of a DistributedSampler take every world_size-th sample.
        ids = [(self._next + k) * trainer.world_size + trainer.global_rank for k in range(batch_size(x))]
        self._next += len(ids)
        limit = self.max_samples
        keep = len(ids) if limit is None else sum(i < limit for i in ids)
        if keep == 0:
            return
        part = x[:keep] if isinstance(x, Tensor) else {name: value[:keep] for name, value in x.items()}
        check_samples(part, y[:keep], self._legal)
        with trainer.strategy.precision_plugin.val_step_context():
            self._rows += self._run.batch(part, y[:keep], ids[:keep])

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        rows = self._rows
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, rows)
            # Padding repeats samples; a row is counted once by its key.
            unique = {(row.id, row.phase, row.norm, row.eps, row.attack): row for part in gathered for row in part}
            rows = [unique[key] for key in sorted(unique, key=lambda k: k[0])]
        if not rows:
            return
        self.result = run.result(rows, domain=str(self._legal), epoch=trainer.current_epoch, stage=_stage(trainer))
        pl_module.log_dict(self.result.metrics(), sync_dist=True)
        if self.out is not None and trainer.is_global_zero:
            self.result.save(self.out / f"{_stage(trainer)}-epoch-{trainer.current_epoch}")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the attacks."""
        self._start(trainer, pl_module, trainer.val_dataloaders)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the attacks."""
        self._start(trainer, pl_module, trainer.test_dataloaders)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Attack the batch."""
        self._attack(trainer, batch, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Attack the batch."""
        self._attack(trainer, batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the figures."""
        self._finish(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the figures."""
        self._finish(trainer, pl_module)


def _stage(trainer: Trainer) -> str:
    return re.sub(r"\W", "_", str(trainer.state.fn.value if trainer.state.fn is not None else "run"))
