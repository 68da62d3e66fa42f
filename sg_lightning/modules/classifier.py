"""Train a spiking network as a classifier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import Metric

from sg_lightning.backbones import Backbone
from sg_lightning.inputs import Input
from sg_lightning.modules import checkpoints
from sg_lightning.modules.checks import check_inputs, check_outputs, unpack
from sg_lightning.recipes import Recorded
from sg_lightning.sampling import SampleGenerator


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


class SpikingClassifier(Recorded, LightningModule):
    """Train a backbone with cross-entropy.

    Logs ``{train,val,test}/{loss,acc}`` once per epoch, exact over batches of any size and over processes. Under
    adversarial training ``train/*`` refers to the inputs trained on. The first batch of each stage is checked: shapes,
    labels in range, no NaN, values in the domain of the backbone, logits rather than probabilities.

    A checkpoint holds the settings of its parts too, so :meth:`load_from_checkpoint` needs the path only, and training
    goes on from it exactly (``trainer.fit(module, data, ckpt_path=...)``): what is random in a training step follows from
    the seed, the epoch and the batch. See :meth:`on_train_batch_start`.

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
        self.save_hyperparameters(self.arguments()[0])  # for loggers
        self.backbone = backbone
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.label_smoothing = label_smoothing
        names = [f"{stage}_{what}" for stage in ("train", "val", "test") for what in ("loss", "acc")]
        self.means = nn.ModuleDict({name: SampleMean() for name in names})
        self._checked: set[str] = set()
        self._step_seed: int | None = None
        self._forgotten: dict[str, str] = {}

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
        for name, reason in self._forgotten.items():
            rank_zero_warn(
                f"this module comes from a checkpoint that could not store its {name} ({reason}), so the default is used; "
                f"pass it to load_from_checkpoint, as a class or a functools.partial of one if it is to be stored"
            )
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            monitor = getattr(scheduler, "monitor", "val/loss")
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}}

    def on_fit_start(self) -> None:
        """Choose the seed of the training steps: the one that the process has, or that of the checkpoint it resumes."""
        if self._step_seed is None:
            self._step_seed = self.trainer.strategy.broadcast(torch.initial_seed())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed torch anew: dropout, random starts and spikes of a step follow from seed, epoch and batch.

        So a run that goes on from a checkpoint, also from the middle of an epoch, is the uninterrupted one to the bit,
        whatever was drawn in between; and all processes stay in step.
        """
        key = SampleGenerator.from_ids(self._step_seed or 0, [0])
        torch.manual_seed(int(key.fork("step", self.current_epoch, batch_idx).keys))

    def on_fit_end(self) -> None:
        """Forget the seed."""
        self._step_seed = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store how to build the module, and the seed of its training steps."""
        checkpoints.write(self, checkpoint, self._forgotten)
        checkpoint["step_seed"] = self._step_seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the seed of the run that wrote the checkpoint."""
        self._step_seed = checkpoint.get("step_seed")

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: Any,
        map_location: Any = "cpu",
        *,
        strict: bool | None = None,
        weights_only: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Load a module from a checkpoint: built as it was, in Python or from a config, from the path alone.

        Args:
            checkpoint_path: A file, a URL that fsspec knows, or a file-like object.
            map_location: Device of the weights, as in ``torch.load``.
            strict: Whether the weights must fit exactly; by default what the module's ``strict_loading`` says.
            weights_only: Refuse anything but tensors and plain values in the file. ``False`` runs code from it.
            **kwargs: Arguments of the constructor; they take precedence over the stored ones.

        Returns:
            A module of the class that was saved if it is a kind of this one, else of this one.

        Raises:
            TypeError: if the checkpoint does not say how to build a part, such as a backbone that is not a
                :class:`~sg_lightning.backbones.Backbone`; pass it then.
            ValueError: if the file is damaged, or names a class that is not imported or not allowed: the rule, by which a
                checkpoint cannot run code, is that of :mod:`sg_lightning.recipes`.
        """
        content = checkpoints.read(checkpoint_path, map_location, weights_only)
        kind = checkpoints.kind_of(content, cls)
        built, forgotten = checkpoints.rebuild(content, kind, kwargs, checkpoint_path)
        module = kind(**built, **kwargs)
        module.configure_model()
        module.on_load_checkpoint(content)
        weights = content["state_dict"]
        module.load_state_dict(weights, strict=module.strict_loading if strict is None else strict)
        module._forgotten = forgotten
        module._step_seed = None  # a new fit of loaded weights is another run
        return module.to(next((value.device for value in weights.values()), None))
