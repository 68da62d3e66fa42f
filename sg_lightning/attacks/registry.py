"""Attacks and estimators by the names that suites use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from sg_lightning.attacks.adapters import Advertorch, Foolbox, PyAutoAttack, Torchattacks
from sg_lightning.attacks.apgd import APGD
from sg_lightning.attacks.base import Attack
from sg_lightning.attacks.estimators import ASSG, BPTR, BPTT, HART, PDSG, RGA, Act, Estimator, Mix
from sg_lightning.attacks.flips import GreedyFlips, SwapFlips, UniversalFlips
from sg_lightning.attacks.gradient import FGSM, PGD, RFGSM, MultiTargeted, RandomNoise
from sg_lightning.attacks.minimal import DDN, FMN, SigmaZero
from sg_lightning.attacks.retiming import SpikeRetimingAttack
from sg_lightning.attacks.sapgd import SAPGD
from sg_lightning.attacks.sda import SDA
from sg_lightning.attacks.sparse import PGD0, SPGD
from sg_lightning.attacks.sparse_search import FlipSearch, SparseRS
from sg_lightning.attacks.square import Square
from sg_lightning.neurons import surrogates
from sg_lightning.threats import Threat

_CLASSES: tuple[type[Attack], ...] = (
    FGSM, RFGSM, PGD, MultiTargeted, APGD, SAPGD, PGD0, SPGD, SigmaZero, DDN, FMN,
    GreedyFlips, SwapFlips, SDA, UniversalFlips, SpikeRetimingAttack,
    Square, SparseRS, FlipSearch, RandomNoise,
    Advertorch, Torchattacks, Foolbox, PyAutoAttack,
)  # fmt: skip
ATTACKS = {attack.kind: attack for attack in _CLASSES}
ESTIMATORS: dict[str, type[Estimator]] = {
    estimator.name: estimator for estimator in (BPTT, BPTR, RGA, Act, HART, Mix, PDSG, ASSG)
}


def make_attack(threat: Threat, attack: str, **settings: Any) -> Attack:
    """Build an attack from its name and settings; ``estimator`` may be a name or a mapping.

    Raises:
        ValueError: on an unknown name or setting, with the known ones.
    """
    if attack not in ATTACKS:
        raise ValueError(f"unknown attack {attack!r}; known attacks: {', '.join(ATTACKS)}")
    known = {f.name for f in fields(ATTACKS[attack])} - {"threat"}
    strange = set(settings) - known
    if strange:
        raise ValueError(f"{attack} has no setting {sorted(strange)}; known: {', '.join(sorted(known))}")
    if "estimator" in settings:
        settings["estimator"] = make_estimator(settings["estimator"])
    return ATTACKS[attack](threat, **settings)


def make_estimator(given: str | Mapping[str, Any] | Estimator | None) -> Estimator | None:
    """Build an estimator from its name, or from a mapping of its name and settings.

    ``"training"`` and ``None`` are the training surrogate; the name of a surrogate is BPTT with it, e.g.
    ``{name: triangular, width: 0.5}``. Mix takes names too: ``{name: mix, estimators: [hart, training]}``.

    Raises:
        ValueError: on an unknown name or setting, with the known ones.
    """
    if given is None or given == "training" or isinstance(given, Estimator):
        return None if given == "training" else given  # type: ignore[return-value]
    settings: dict[str, Any] = {"name": given} if isinstance(given, str) else dict(given)
    name = settings.pop("name", None)
    if name in surrogates.SURROGATES:
        return BPTT(surrogates.from_name(name, **settings))
    if name not in ESTIMATORS:
        raise ValueError(
            f"unknown estimator {name!r}; known: training, {', '.join([*ESTIMATORS, *surrogates.SURROGATES])}"
        )
    known = {f.name for f in fields(ESTIMATORS[name])}
    strange = set(settings) - known
    if strange:
        raise ValueError(f"the estimator {name} has no setting {sorted(strange)}; known: {', '.join(sorted(known))}")
    if isinstance(settings.get("estimators"), Iterable):
        settings["estimators"] = [make_estimator(item) or BPTT() for item in settings["estimators"]]
    return ESTIMATORS[name](**settings)
