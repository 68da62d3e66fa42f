"""Threat models: which perturbations an attacker may make. Data, not attack code."""

from sg_lightning.threats.base import SingleThreat, Threat, parse_eps
from sg_lightning.threats.budget import (
    THREATS,
    Budget,
    Budgets,
    JointBudget,
    make_threat,
    make_threats,
    split_norm,
)
from sg_lightning.threats.joint import Joint
from sg_lightning.threats.modality import Modality
from sg_lightning.threats.norms import L1, L2, Linf
from sg_lightning.threats.relaxed import RelaxedL1, RelaxedL2, RelaxedLinf, is_relaxed
from sg_lightning.threats.retiming import SpikeRetiming
from sg_lightning.threats.sparse import L0, EventFlips

__all__ = [
    "L0",
    "L1",
    "L2",
    "THREATS",
    "Budget",
    "Budgets",
    "EventFlips",
    "Joint",
    "JointBudget",
    "Linf",
    "Modality",
    "RelaxedL1",
    "RelaxedL2",
    "RelaxedLinf",
    "SingleThreat",
    "SpikeRetiming",
    "Threat",
    "is_relaxed",
    "make_threat",
    "make_threats",
    "parse_eps",
    "split_norm",
]
