"""Describe the input gradient of the true class of each sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sg_lightning.inputs import Input, detached
from sg_lightning.metrics import gradient_sparsity
from sg_lightning.objectives.directions import flat
from sg_lightning.objectives.probability import Output, probability_at
from sg_lightning.objectives.sparse_gradient import input_gradient, watched


def input_gradient_metrics(
    forward: Callable[[Input], Tensor], x: Input, y: Tensor, *, output: Output = "margin"
) -> dict[str, Tensor]:
    """Measure size and sparsity of the gradient of the true class's probability at the input, per sample.

    Touches no ``.grad`` and works under ``no_grad`` and ``inference_mode``. The surrogate of spiking neurons is part of
    the answer. The mode of the model is the caller's: ``model.eval()`` unless batch statistics are wanted.

    Args:
        forward: Function from inputs to logits (B, K).
        x: Input (B, ...), or a dict of inputs by modality, taken together as one vector.
        y: True classes, int64 (B,).
        output: ``"margin"`` or ``"softmax"``, as in :func:`~sg_lightning.objectives.sparse_gradient_penalty`.

    Returns:
        Measures of :func:`~sg_lightning.metrics.gradient_sparsity` by name, each (B,).
    """
    with torch.inference_mode(False), torch.enable_grad():
        point, labels = watched(detached(x)), y.clone()
        logits = forward(point)
        p = probability_at(logits, labels, output)(logits)
        return gradient_sparsity(flat(input_gradient(p, point)).detach())
