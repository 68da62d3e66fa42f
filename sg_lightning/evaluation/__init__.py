"""Evaluate robustness: per sample, resumable, every figure derived from rows. Needs no Lightning."""

from sg_lightning.evaluation.checks import Check
from sg_lightning.evaluation.distances import accuracy_at, minimal_distances
from sg_lightning.evaluation.engine import RobustnessRun
from sg_lightning.evaluation.measure import evaluate
from sg_lightning.evaluation.result import RobustnessResult, SuiteRecord
from sg_lightning.evaluation.rows import Row
from sg_lightning.evaluation.statistics import Share, paired_difference, wilson

__all__ = [
    "Check",
    "RobustnessResult",
    "RobustnessRun",
    "Row",
    "Share",
    "SuiteRecord",
    "accuracy_at",
    "evaluate",
    "minimal_distances",
    "paired_difference",
    "wilson",
]
