"""Attacks of Foolbox 3.3.4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sg_lightning.attacks.adapters.base import OneClass, choose, library, step_size
from sg_lightning.attacks.adapters.shell import Shell

_TARGETED = "it needs a target label per sample, and attacks here get true labels only"
REFUSED = {
    "GenAttack": _TARGETED,
    "DatasetAttack": "it takes its examples from a set that it has to be fed first",
    "PointwiseAttack": "it refines adversarial examples that it has to be given",
    "BinarizationRefinementAttack": "it refines adversarial examples that it has to be given",
    "SpatialAttack": "it turns and shifts images, so that its results lie in no norm ball",
}


@dataclass(frozen=True)
class Foolbox(OneClass):
    """Run an attack of Foolbox 3.3.4 (Rauber et al., JOSS 2020; MIT).

    Args:
        threat: ``Linf``, ``L2``, ``L1`` or ``L0`` in a box with two walls. Attacks without a norm of their own (blur,
            contrast, ...) are measured in that of the threat.
        algorithm: Name of a class of ``foolbox.attacks``, e.g. ``"LInfFMNAttack"``.
        settings: Its arguments, e.g. ``{"steps": 100}``.

    Raises:
        ValueError: on a class that is unknown, refused or made for another norm, or an unknown setting.
        ImportError: if Foolbox is not installed.
    """

    kind: ClassVar[str] = "foolbox"
    package: ClassVar[str] = "foolbox"
    command: ClassVar[str] = "pip install 'sg-lightning[attack-libraries]'"

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(self, self.algorithm, {self.algorithm: self.threat.norm}, REFUSED)
        norms = {name: self._norms(name) for name in vars(library("foolbox.attacks", self.command))}
        choose(self, self.algorithm, {name: norm for name, norm in norms.items() if norm}, REFUSED)
        self._check_settings([self._build], {"distance"})

    @property
    def _build(self) -> Any:
        return getattr(library("foolbox.attacks", self.command), self.algorithm)

    def _norms(self, name: str) -> str:
        """Return the norms that a name of the library serves, "" if it is no attack."""
        found = getattr(library("foolbox.attacks", self.command), name)
        base = library("foolbox.attacks.base", self.command)
        if not isinstance(found, type) or not issubclass(found, base.AttackWithDistance) or name in REFUSED:
            return ""
        if issubclass(found, base.FlexibleDistanceMinimizationAttack):
            return "linf l2 l1 l0"
        p = getattr(getattr(found, "distance", None), "p", None)
        return "" if p is None else f"l{p:g}"

    def _perturb(self, algorithm: str, shell: Shell, y: Tensor, eps: float, seed: int) -> Tensor:
        foolbox = library("foolbox", self.command)
        fixed = {"distance": getattr(foolbox.distances, self.threat.norm)}
        defaults = {"rel_stepsize": step_size(self._build, self.settings, 1.0)}
        attack = self._build(**self._arguments(self._build, fixed, defaults))
        model = foolbox.PyTorchModel(shell.eval(), bounds=(0, 1), device=shell.unit.device)
        # The first result is not yet clipped to eps, which Foolbox cannot do under L0; the threat projects it.
        budget = None if self.threat.norm == "l0" else eps
        adversarial: Tensor = attack(model, shell.unit, foolbox.criteria.Misclassification(y), epsilons=budget)[0]
        return adversarial
