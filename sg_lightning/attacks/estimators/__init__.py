"""Gradient estimators: what replaces the surrogate gradient while an attack runs."""

from sg_lightning.attacks.estimators.base import Estimator, Memory
from sg_lightning.attacks.estimators.surrogate import BPTT

__all__ = ["BPTT", "Estimator", "Memory"]
