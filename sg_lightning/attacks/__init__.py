"""The attack engine: optimisers inside a threat model that touch the model through an Oracle only."""

from sg_lightning.attacks.base import Attack, AttackResult
from sg_lightning.attacks.estimators import BPTT
from sg_lightning.attacks.gradient import ATTACKS, FGSM, PGD, RFGSM, RandomNoise
from sg_lightning.attacks.losses import LOSSES
from sg_lightning.attacks.oracle import Oracle
from sg_lightning.attacks.suites import Entry, Suite, load_suite, read_suite, suite_names
from sg_lightning.attacks.verification import Verdict, verify

__all__ = [
    "ATTACKS",
    "BPTT",
    "FGSM",
    "LOSSES",
    "PGD",
    "RFGSM",
    "Attack",
    "AttackResult",
    "Entry",
    "Oracle",
    "RandomNoise",
    "Suite",
    "Verdict",
    "load_suite",
    "read_suite",
    "suite_names",
    "verify",
]
