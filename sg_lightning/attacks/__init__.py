"""The attack engine: optimisers inside a threat model that touch the model through an Oracle only."""

from sg_lightning.attacks.adapters import Advertorch, Foolbox, PyAutoAttack, Torchattacks
from sg_lightning.attacks.apgd import APGD
from sg_lightning.attacks.base import Attack, AttackResult
from sg_lightning.attacks.estimators import ASSG, BPTR, BPTT, ENSEMBLES, HART, PDSG, RGA, Act, Estimator, Mix
from sg_lightning.attacks.flips import GreedyFlips, SwapFlips, UniversalFlips
from sg_lightning.attacks.gradient import FGSM, PGD, RFGSM, MultiTargeted, RandomNoise
from sg_lightning.attacks.losses import LOSSES
from sg_lightning.attacks.minimal import DDN, FMN, SigmaZero
from sg_lightning.attacks.modalities import InTurn, OnModality
from sg_lightning.attacks.oracle import Oracle
from sg_lightning.attacks.registry import ATTACKS, ESTIMATORS, make_attack, make_estimator
from sg_lightning.attacks.retiming import SpikeRetimingAttack
from sg_lightning.attacks.sapgd import SAPGD
from sg_lightning.attacks.sda import SDA
from sg_lightning.attacks.sparse import PGD0, SPGD
from sg_lightning.attacks.sparse_search import FlipSearch, SparseRS
from sg_lightning.attacks.square import Square
from sg_lightning.attacks.substitute import Substitute, with_substitutes
from sg_lightning.attacks.suites import Entry, Suite, load_suite, read_suite, suite_names
from sg_lightning.attacks.tuning import tune
from sg_lightning.attacks.verification import Verdict, verify

__all__ = [
    "APGD",
    "ASSG",
    "ATTACKS",
    "BPTR",
    "BPTT",
    "DDN",
    "ENSEMBLES",
    "ESTIMATORS",
    "FGSM",
    "FMN",
    "HART",
    "LOSSES",
    "PDSG",
    "PGD",
    "PGD0",
    "RFGSM",
    "RGA",
    "SAPGD",
    "SDA",
    "SPGD",
    "Act",
    "Advertorch",
    "Attack",
    "AttackResult",
    "Entry",
    "Estimator",
    "FlipSearch",
    "Foolbox",
    "GreedyFlips",
    "InTurn",
    "Mix",
    "MultiTargeted",
    "OnModality",
    "Oracle",
    "PyAutoAttack",
    "RandomNoise",
    "SigmaZero",
    "SparseRS",
    "SpikeRetimingAttack",
    "Square",
    "Substitute",
    "Suite",
    "SwapFlips",
    "Torchattacks",
    "UniversalFlips",
    "Verdict",
    "load_suite",
    "make_attack",
    "make_estimator",
    "read_suite",
    "suite_names",
    "tune",
    "verify",
    "with_substitutes",
]
