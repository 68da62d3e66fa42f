"""The attack engine: optimisers inside a threat model that touch the model through an Oracle only."""

from sg_lightning.attacks.base import Attack, AttackResult
from sg_lightning.attacks.estimators import BPTT, Estimator
from sg_lightning.attacks.flips import GreedyFlips, SwapFlips, UniversalFlips
from sg_lightning.attacks.gradient import FGSM, PGD, RFGSM, RandomNoise
from sg_lightning.attacks.losses import LOSSES
from sg_lightning.attacks.oracle import Oracle
from sg_lightning.attacks.registry import ATTACKS, ESTIMATORS, make_attack, make_estimator
from sg_lightning.attacks.retiming import SpikeRetimingAttack
from sg_lightning.attacks.sda import SDA
from sg_lightning.attacks.suites import Entry, Suite, load_suite, read_suite, suite_names
from sg_lightning.attacks.verification import Verdict, verify

__all__ = [
    "ATTACKS",
    "BPTT",
    "ESTIMATORS",
    "FGSM",
    "LOSSES",
    "PGD",
    "RFGSM",
    "SDA",
    "Attack",
    "AttackResult",
    "Entry",
    "Estimator",
    "GreedyFlips",
    "Oracle",
    "RandomNoise",
    "SpikeRetimingAttack",
    "Suite",
    "SwapFlips",
    "UniversalFlips",
    "Verdict",
    "load_suite",
    "make_attack",
    "make_estimator",
    "read_suite",
    "suite_names",
    "verify",
]
