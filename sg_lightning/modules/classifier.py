"""Train a spiking network as a classifier."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import Metric

from sg_lightning.backbones import Backbone
from sg_lightning.inputs import Input
from sg_lightning.modules.checks import check_inputs, check_outputs, unpack


class SampleMean(Metric):
    """Average one value per sample, exactly, over batches of any size and over processes; NaN stays NaN."""

    higher_is_better = None
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add the values of some samples, of any shape."""
        self.total += values.detach().float().sum()
        self.count += values.numel()

    def compute(self) -> Tensor:
        """Return the mean of all values so far."""
        return self.total / self.count


def adamw(params: Iterable[Any]) -> torch.optim.AdamW:
    """Make AdamW with a learning rate of 1e-3."""
    # A named function: jsonargparse reads a lambda into settings, and its weight_decay stays when a config picks SGD.
    return torch.optim.AdamW(params, lr=1e-3)


class SpikingClassifier(LightningModule):
    """Train a backbone with cross-entropy.

    Logs ``{train,val,test}/{loss,acc}`` once per epoch, exact over batches of any size and over processes. Under
    adversarial training ``train/*`` refers to the inputs trained on. The first batch of each stage is checked: shapes,
    labels in range, no NaN, values in the domain of the backbone, logits rather than probabilities.

    Mixins override :meth:`loss_inputs`. Calling ``self(x)`` on the way to a loss marks ``x`` as a point of that loss,
    where :class:`~sg_lightning.callbacks.SparseGradient` takes its penalty; other uses of the network within a step go
    through ``self.backbone``.

    Args:
        backbone: Network from inputs (B, ...) in natural units to logits (B, K). In Python any module will do.
        optimizer: Makes the optimiser from the parameters.
        lr_scheduler: Makes a scheduler from the optimiser, stepped once per epoch. ``ReduceLROnPlateau`` watches its
            ``monitor``, or ``val/loss``.
        label_smoothing: Share of the target spread over all classes in training, in [0, 1).

    Shape:
        (B, ...) to (B, K).

    Raises:
        TypeError: if the backbone is no module, or returns no tensor.
        ValueError: on ``label_smoothing`` out of range, or a first batch that does not fit.
    """

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerCallable = adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
        *,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone must be a torch.nn.Module from inputs to logits, got {type(backbone).__name__}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.save_hyperparameters()
        self.backbone = backbone
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.label_smoothing = label_smoothing
        names = [f"{stage}_{what}" for stage in ("train", "val", "test") for what in ("loss", "acc")]
        self.means = nn.ModuleDict({name: SampleMean() for name in names})
        self._checked: set[str] = set()

    def forward(self, x: Input) -> Tensor:
        """Return logits (B, K)."""
        return self.backbone(x)

    def loss_inputs(self, x: Input, y: Tensor) -> list[Input]:
        """Return the points at which the cross-entropy of this training step is taken and averaged."""
        return [x]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the training loss of a batch (x, y)."""
        return self._step("train", batch, self.label_smoothing)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure loss and accuracy on a batch (x, y)."""
        self._step("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Measure loss and accuracy on a batch (x, y)."""
        self._step("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return logits for a batch x or (x, y)."""
        return self(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def _step(self, stage: str, batch: Any, label_smoothing: float = 0.0) -> Tensor:
        x, y = unpack(batch)
        first = stage not in self._checked
        if first:
            check_inputs(x, y, self.backbone, stage)
        points = self.loss_inputs(x, y) if stage == "train" else [x]
        losses = []
        for point in points:
            logits = self(point)
            if first:
                check_outputs(logits, y, self.backbone)
            # One loss per sample, so that the logged mean is exact for any batch size.
            losses.append(cross_entropy(logits, y, label_smoothing=label_smoothing, reduction="none"))
            self._mean(stage, "acc").update(logits.argmax(1) == y)
        loss = torch.stack(losses)
        self._mean(stage, "loss").update(loss)
        self._checked.add(stage)
        for what in ("loss", "acc"):
            bar = (stage, what) in (("train", "loss"), ("val", "acc"))
            self.log(f"{stage}/{what}", self._mean(stage, what), on_step=False, on_epoch=True, prog_bar=bar)
        return loss.mean()

    def _mean(self, stage: str, what: str) -> SampleMean:
        return cast(SampleMean, self.means[f"{stage}_{what}"])

    def setup(self, stage: str) -> None:
        """Check the first batches of each run of the trainer anew."""
        self._checked.clear()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser and, if any, the scheduler."""
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            monitor = getattr(scheduler, "monitor", "val/loss")
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}}

    @classmethod
    def _stored(cls, checkpoint_path: Any) -> type[SpikingClassifier]:
        """Return the subclass that a checkpoint names, if it is one of ``cls`` and imported; else ``cls``."""
        if not isinstance(checkpoint_path, (str, Path)) or not Path(checkpoint_path).is_file():
            return cls
        content = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)
        name = content.get("hyper_parameters", {}).get("_class_path", "").rsplit(".", 1)[-1]
        kinds, found = [cls], [cls]
        while kinds:
            kinds = [kind for parent in kinds for kind in parent.__subclasses__()]
            found += [kind for kind in kinds if kind.__name__ == name]
        return found[-1]

    def _set_hparams(self, hp: MutableMapping[str, Any]) -> None:  # type: ignore[override]
        # Live networks and callables cannot be stored: weights_only loading refuses them, for trainer.test(ckpt_path=)
        # too. Under LightningCLI the values are the plain config of the same objects, so nothing is lost there.
        super()._set_hparams({key: value for key, value in hp.items() if _is_plain(value)})

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a module from a checkpoint; arguments as for :class:`lightning.pytorch.LightningModule`.

        A checkpoint of the command line says which subclass it holds, and that is what is returned.

        Raises:
            TypeError: if the checkpoint does not say how to build a part, such as the backbone of a module that was
                built in Python.
        """
        try:
            return super(SpikingClassifier, cls._stored(checkpoint_path)).load_from_checkpoint(
                checkpoint_path, *args, **kwargs
            )
        except TypeError as error:
            if "missing" not in str(error):
                raise
            raise TypeError(
                f"the checkpoint {checkpoint_path} holds the weights but not the settings of every part of "
                f"{cls.__name__} ({error}), because it was built in Python; build them as they were and pass them: "
                f"{cls.__name__}.load_from_checkpoint(path, backbone=net)"
            ) from error


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))
