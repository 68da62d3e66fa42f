"""Measure robustness while training, validating or testing any LightningModule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DistributedSampler, SequentialSampler

from sg_lightning.attacks import Estimator, Oracle, Suite, load_suite, read_suite
from sg_lightning.attacks.capture import recorder
from sg_lightning.callbacks.loggers import log_result
from sg_lightning.callbacks.progress import bar_beside
from sg_lightning.domains import Domain, Domains, domains_text
from sg_lightning.evaluation import RobustnessResult
from sg_lightning.evaluation.adversarial import Keep, check_keep
from sg_lightning.evaluation.data import check_samples, data_name, legal_domain
from sg_lightning.evaluation.session import Session
from sg_lightning.inputs import batch_size, select
from sg_lightning.modules.checks import refuse_sharding
from sg_lightning.threats import Budgets


class RobustnessEvaluation(Callback):
    """Attack the validation or test batches of any LightningModule and log what is left.

    The module's ``forward(x)`` must give logits (B, K) and its batches be ``(x, y)``. Works in ``fit``, ``validate``
    and ``test`` (inference mode too), batch by batch, and leaves training bit-identical to a run without it. Figures
    are logged under the names of :meth:`RobustnessResult.metrics`; the last result is in :attr:`result`.

    Before the first measurement there is nothing to monitor, and in between ``EarlyStopping`` and ``ModelCheckpoint``
    see the last value: give ``ModelCheckpoint`` the same ``every_n_epochs``, and ``EarlyStopping`` ``strict=False`` and
    a patience longer than that. The progress bar of the trainer gets a second one while attacks run.

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
        out: Folder for the result, ``None``: nothing is written. In ``validate`` and ``test`` rows are written as they
            are made and an interrupted run goes on from there; ``fit`` writes one folder per attacked epoch.
        keep: ``"all"`` writes the adversarial input of every sample into ``out`` too, in ``validate`` and ``test``.
        cuda_graphs: As in :func:`~sg_lightning.evaluation.evaluate`.

    Raises:
        ValueError: on numbers out of range or ``keep="all"`` without ``out``; at the start of a stage on missing
            budgets, an unknown suite, a shuffled loader or a strategy that splits the weights over processes.
    """

    def __init__(
        self,
        suite: str | Path | Suite = "quick",
        *,
        budgets: Budgets | None = None,
        domain: Domains | None = None,
        every_n_epochs: int = 1,
        max_samples: int | None = None,
        seed: int = 0,
        check_samples_count: int = 0,
        estimator: Estimator | None = None,
        eot: int = 1,
        votes: int = 1,
        out: str | Path | None = None,
        keep: Keep = "few",
        cuda_graphs: bool = False,
    ) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be >= 1, got {every_n_epochs}")
        if max_samples is not None and max_samples < 1:
            raise ValueError(f"max_samples must be >= 1 or None, got {max_samples}")
        if check_samples_count < 0:
            raise ValueError(f"check_samples_count must be >= 0, got {check_samples_count}")
        check_keep(keep, out)
        if not isinstance(suite, Suite):
            read_suite(suite)  # a typing error should not wait for the first evaluation
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
        self.keep: Keep = keep
        self.cuda_graphs = cuda_graphs
        self.result: RobustnessResult | None = None
        self._session: Session | None = None
        self._next = 0
        self._samples = 0
        self._legal: Domains = Domain()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolve the suite now: a typing error should not cost an epoch."""
        refuse_sharding(
            trainer, "RobustnessEvaluation", "each process attacks as long as its samples need, and would wait for the "
            "others", "evaluate the checkpoint with strategy='ddp' or one device",
        )  # fmt: skip
        self._resolve(trainer)

    def _resolve(self, trainer: Trainer) -> Suite:
        data = getattr(trainer, "datamodule", None)
        self._legal = legal_domain(self.domain, data)
        return load_suite(self.suite, self.budgets or getattr(data, "budgets", None) or {}, self._legal)

    def _start(self, trainer: Trainer, pl_module: LightningModule, loaders: Any) -> None:
        self._session, self._next = None, 0
        fitting = trainer.state.fn == "fit"
        due = not fitting or (trainer.current_epoch + 1) % self.every_n_epochs == 0
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
        self._samples = total if self.max_samples is None else min(total, self.max_samples)
        record = recorder(self.cuda_graphs, pl_module.device)
        oracle = Oracle(pl_module, estimator=self.estimator, eot=self.eot, votes=self.votes, record=record)
        self._session = Session(
            oracle, self._resolve(trainer).applicable(pl_module)[0], samples=self._samples, seed=self.seed,
            check_samples_count=self.check_samples_count,
            # While training, each epoch is another network: nothing to go on with.
            out=None if fitting else self._folder(trainer), keep="few" if fitting else self.keep,
            bar=bar_beside(trainer),
        )  # fmt: skip

    def _folder(self, trainer: Trainer) -> Path | None:
        if self.out is None:
            return None
        return self.out / f"fit-epoch-{trainer.current_epoch}" if trainer.state.fn == "fit" else self.out

    def _attack(self, trainer: Trainer, batch: Any, dataloader_idx: int) -> None:
        if self._session is None or dataloader_idx > 0:
            return
        if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
            raise ValueError("RobustnessEvaluation needs batches (x, y): wrap the data set so that it gives pairs")
        x, y = batch
        # Ranks of a DistributedSampler take every world_size-th sample; ids beyond the data are its padding.
        ids = (self._next + torch.arange(batch_size(x))) * trainer.world_size + trainer.global_rank
        self._next += len(ids)
        keep = (ids < self._samples).nonzero().squeeze(1)
        if len(keep) == 0:
            return
        x, y = select(x, keep.to(y.device)), y[keep.to(y.device)]
        check_samples(x, y, self._legal)
        with trainer.strategy.precision_plugin.val_step_context():
            self._session.batch(x, y, ids[keep])

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        stage = trainer.state.fn.value if trainer.state.fn is not None else ""
        name = data_name(getattr(trainer, "datamodule", None))
        known = {"data": name} if name else {}
        result = session.finish(domain=domains_text(self._legal), epoch=trainer.current_epoch, stage=stage, **known)
        if result is None:
            return
        self.result = result
        pl_module.log_dict(result.metrics(), sync_dist=True)
        if trainer.is_global_zero:
            folder = self._folder(trainer)
            if folder is not None and stage == "fit":
                result.save(folder)
            if stage != "fit":
                self._show(trainer)

    def _show(self, trainer: Trainer) -> None:
        """Give the last result to every logger as a table and as curves."""
        if self.result is None or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            log_result(logger, self.result, trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the progress bar away."""
        if self._session is not None:
            self._session.close()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last result of the training."""
        self._show(trainer)

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
