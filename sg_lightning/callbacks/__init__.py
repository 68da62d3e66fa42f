"""Lightning callbacks that work on our modules and on yours."""

from sg_lightning.callbacks.memory import SaveMemory
from sg_lightning.callbacks.predictions import PredictionWriter
from sg_lightning.callbacks.robustness import RobustnessEvaluation
from sg_lightning.callbacks.sparse_gradient import SparseGradient

__all__ = ["PredictionWriter", "RobustnessEvaluation", "SaveMemory", "SparseGradient"]
