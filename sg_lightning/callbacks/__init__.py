"""Lightning callbacks that work on our modules and on yours."""

from sg_lightning.callbacks.memory import SaveMemory
from sg_lightning.callbacks.predictions import PredictionWriter
from sg_lightning.callbacks.robustness import RobustnessEvaluation
from sg_lightning.callbacks.sparse_gradient import SparseGradient
from sg_lightning.callbacks.speed import ChannelsLast, KeepFreedMemory

__all__ = [
    "ChannelsLast", "KeepFreedMemory", "PredictionWriter", "RobustnessEvaluation", "SaveMemory", "SparseGradient",
]  # fmt: skip
