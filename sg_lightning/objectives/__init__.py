"""Training objectives as pure functions of a step: no Lightning, no state."""

from sg_lightning.objectives.gradient_metrics import input_gradient_metrics
from sg_lightning.objectives.sparse_gradient import gradient_ratio_penalty, sparse_gradient_penalty

__all__ = ["gradient_ratio_penalty", "input_gradient_metrics", "sparse_gradient_penalty"]
