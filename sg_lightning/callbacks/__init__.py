"""Lightning callbacks that work on our modules and on yours."""

from sg_lightning.callbacks.robustness import RobustnessEvaluation
from sg_lightning.callbacks.sparse_gradient import SparseGradient

__all__ = ["RobustnessEvaluation", "SparseGradient"]
