"""Figures and one self-contained HTML report from evaluation results. Needs matplotlib when something is drawn."""

from sg_lightning.reporting.animation import animation
from sg_lightning.reporting.pictures import examples_figure
from sg_lightning.reporting.plots import accuracy_curves, norm_matrix, union_bars
from sg_lightning.reporting.report import write_report
from sg_lightning.reporting.style import to_png
from sg_lightning.reporting.training import gradient_sparsity_figure, training_curves

__all__ = [
    "accuracy_curves",
    "animation",
    "examples_figure",
    "gradient_sparsity_figure",
    "norm_matrix",
    "to_png",
    "training_curves",
    "union_bars",
    "write_report",
]
