"""A Trainer that also evaluates robustness and writes predictions, for the command line."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from sg_lightning.attacks import Estimator
from sg_lightning.callbacks import PredictionWriter, RobustnessEvaluation
from sg_lightning.evaluation import RobustnessResult
from sg_lightning.evaluation.adversarial import Keep


class RobustTrainer(Trainer):
    """Lightning's Trainer, which also attacks and writes predictions; its arguments are the same.

    Attributes:
        result: What the last evaluation found.
        result_folder: Where it was written.
        predictions: File of the last predictions.
    """

    result: RobustnessResult | None = None
    result_folder: Path | None = None
    predictions: Path | None = None

    def predict(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
        out: str | Path | None = None,
    ) -> Any:
        """Compute the logits of every test sample and write them as a CSV file.

        Args:
            model: The module.
            dataloaders: Loaders; or give ``datamodule``.
            datamodule: The data; its ``predict_dataloader`` gives the test samples.
            return_predictions: Also return the logits, batch by batch; on by default but with forked processes.
            ckpt_path: Checkpoint of the weights.
            weights_only: Load nothing but tensors and plain values from the checkpoint.
            out: The file: columns id, prediction, logit_0, logit_1, ... By default beside the checkpoints:
                ``predictions/<checkpoint>.csv``; without a checkpoint nothing is written.

        Returns:
            The logits of each batch, if asked for.
        """
        if out is None and ckpt_path is not None and Path(ckpt_path).is_file():
            out = Path(ckpt_path).parent.parent / "predictions" / f"{Path(ckpt_path).stem}.csv"
        writer = [PredictionWriter(out)] if out is not None else []
        with self._watched_by(*writer):
            logits = super().predict(
                model, dataloaders, datamodule, return_predictions, ckpt_path, weights_only=weights_only
            )
        self.predictions = None if out is None else Path(out)
        return logits

    @contextmanager
    def _watched_by(self, *more: Callback) -> Iterator[None]:
        """Add callbacks inside the block, in place of those that watched robustness during the training."""
        before = self.callbacks  # type: ignore[has-type]
        self.callbacks = [c for c in before if not isinstance(c, RobustnessEvaluation)] + list(more)
        try:
            yield
        finally:
            self.callbacks = before

    def evaluate(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
        suite: str = "basic",
        out: str | Path | None = None,
        max_samples: int | None = None,
        seed: int = 0,
        estimator: Estimator | None = None,
        eot: int = 1,
        votes: int = 1,
        check_samples_count: int = 128,
        keep: Keep = "few",
        cuda_graphs: bool = False,
    ) -> RobustnessResult:
        """Attack the test set with a suite of attacks; on any number of processes, and again from where it stopped.

        Args:
            model: The module; its ``forward(x)`` gives logits.
            datamodule: The data, with ``budgets`` per norm.
            ckpt_path: Checkpoint of the weights.
            weights_only: Load nothing but tensors and plain values from the checkpoint.
            suite: Name of a suite (quick, basic, standard, thorough, paper-sr, assg) or path of a YAML file.
            out: Folder of rows and result; an interrupted run goes on from there. By default beside the checkpoints:
                ``robustness/<checkpoint>-<suite>``.
            max_samples: Only the first so many samples.
            seed: Seed of random starts and controls.
            estimator: Gradient estimator of the attacks; null: the training surrogate.
            eot: Gradients averaged per step, for stochastic models.
            votes: Forward passes whose majority decides, for stochastic models.
            check_samples_count: Samples on which all attacks run, for the honesty checks; 0 switches them off.
            keep: all: also write the adversarial input of every sample, one file adversarial/NORM.pt per norm in ``out``;
                few: keep some per norm, for pictures.
            cuda_graphs: Capture the iterations of attacks in CUDA graphs: for small networks on a GPU.

        Returns:
            The result, the same on every process.
        """
        if out is None and ckpt_path is not None and Path(ckpt_path).is_file():
            out = Path(ckpt_path).parent.parent / "robustness" / f"{Path(ckpt_path).stem}-{Path(suite).stem}"
        attacks = RobustnessEvaluation(
            suite, max_samples=max_samples, seed=seed, check_samples_count=check_samples_count, estimator=estimator,
            eot=eot, votes=votes, out=out, keep=keep, cuda_graphs=cuda_graphs,
        )  # fmt: skip
        with self._watched_by(attacks), warnings.catch_warnings():
            # Of the samples that the sampler repeats, so that all processes have equally many, each counts once.
            warnings.filterwarnings("ignore", "Using `DistributedSampler`")
            self.test(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=weights_only, verbose=False)
        if attacks.result is None:
            raise ValueError("the test set is empty, or limit_test_batches left nothing of it: nothing was attacked")
        self.result, self.result_folder = attacks.result, attacks.out
        return attacks.result
