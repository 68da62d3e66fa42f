"""Gradient estimators: what replaces the surrogate gradient while an attack runs."""

from sg_lightning.attacks.estimators.assg import ASSG
from sg_lightning.attacks.estimators.base import Estimator, Memory, SingleEstimator
from sg_lightning.attacks.estimators.ensembles import ENSEMBLES
from sg_lightning.attacks.estimators.hart import HART
from sg_lightning.attacks.estimators.mix import Mix
from sg_lightning.attacks.estimators.pdsg import PDSG
from sg_lightning.attacks.estimators.rate import BPTR, RGA, Act
from sg_lightning.attacks.estimators.surrogate import BPTT

__all__ = [
    "ASSG",
    "BPTR",
    "BPTT",
    "ENSEMBLES",
    "HART",
    "PDSG",
    "RGA",
    "Act",
    "Estimator",
    "Memory",
    "Mix",
    "SingleEstimator",
]
