"""Errors for strategies, data and networks that do not fit, raised before a stage or on its first batch."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from sg_lightning.backbones import Backbone
from sg_lightning.domains import check_values
from sg_lightning.inputs import Input, apply, tensors
from sg_lightning.objectives.probability import check_label_range, check_labels, check_logits


def unpack(batch: Any) -> tuple[Input, Tensor]:
    """Split a batch into inputs and labels.

    Raises:
        ValueError: unless it is a pair whose first element is a tensor or a dict of tensors.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        what = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
        raise ValueError(f"SpikingClassifier needs batches (x, y), got a {what}")
    x, y = batch
    parts = list(x.values()) if isinstance(x, dict) else [x]
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        raise ValueError(f"x must be a tensor or a dict of tensors by modality, got {type(x).__name__}")
    return x, y


def check_inputs(x: Input, y: Tensor, backbone: nn.Module, stage: str) -> None:
    """Check shape, dtype, NaN and domain of the inputs, and that x and y have equally many samples."""
    if isinstance(backbone, Backbone) and isinstance(x, Tensor) and x.dim() != len(backbone.input_shape) + 1:
        backbone.check_input(x)  # a wrong number of axes says more than the values that come with it
    name = f"x of the first {stage} batch" if isinstance(x, Tensor) else f"the first {stage} batch"
    check_values(apply(Tensor.detach, x), getattr(backbone, "domain", None), name)
    for part in tensors(x):
        if isinstance(y, Tensor) and y.dim() and part.shape[0] != y.shape[0]:
            raise ValueError(f"{name} has {part.shape[0]} samples but there are {y.shape[0]} labels")
    # Before an attack or the loss indexes with them; networks that do not say K are checked by their outputs.
    classes = getattr(backbone, "num_classes", None)
    if isinstance(y, Tensor) and y.dtype == torch.int64 and y.numel() and isinstance(classes, int):
        check_label_range(y, classes)


def check_outputs(logits: Tensor, y: Tensor, backbone: nn.Module) -> None:
    """Check that the network returned logits (B, K), not a tuple and not probabilities, and that the labels fit."""
    name = type(backbone).__name__
    check_logits(logits, name)
    check_labels(y, logits)
    check_label_range(y, logits.shape[1])
    z = logits.detach().float()
    if not bool(torch.isfinite(z).all()):
        raise ValueError(f"{name} returned NaN or infinite logits; check its weights, the learning rate and the data")
    sums_to_one = bool(((z.sum(1) - 1).abs() < 1e-3).all())
    if len(z) > 1 and sums_to_one and bool((z >= 0).all()) and bool((z <= 1).all()):
        raise ValueError(
            f"{name} returns probabilities (rows sum to 1), but logits are needed: cross-entropy and attacks apply the "
            "softmax themselves. Remove the softmax at its end"
        )


def refuse_sharding(trainer: Trainer, name: str, reason: str, cure: str = "use strategy='ddp' or one device") -> None:
    """Raise ``ValueError`` if the strategy splits the weights of a layer over processes.

    Such a strategy gathers the weights in the forward and backward passes that it runs itself, in step on all
    processes. Passes of our own, for the gradient with respect to the input, are not among them.
    """
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise ValueError(  # noqa: TRY004 - a bad combination of settings, not a bad type
            f"{name} does not work with {type(trainer.strategy).__name__}, which splits the weights over processes: "
            f"{reason}; {cure}"
        )
