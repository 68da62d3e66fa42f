"""Attacks of torchattacks 3.5.1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sg_lightning.attacks.adapters.base import OneClass, choose, library, step_size
from sg_lightning.attacks.adapters.shell import Shell

NORMS = {
    **dict.fromkeys(
        (
            "FGSM", "BIM", "RFGSM", "PGD", "EOTPGD", "FFGSM", "TPGD", "MIFGSM", "UPGD", "DIFGSM", "TIFGSM", "Jitter",
            "NIFGSM", "PGDRS", "SINIFGSM", "VMIFGSM", "VNIFGSM", "SPSA", "PIFGSM", "PIFGSMPP",
        ),
        "linf",
    ),
    **dict.fromkeys(("CW", "PGDL2", "PGDRSL2", "DeepFool", "EADEN"), "l2"),
    **dict.fromkeys(("APGD", "APGDT", "FAB", "Square", "AutoAttack"), "linf l2"),
    "EADL1": "l1",
    **dict.fromkeys(("SparseFool", "OnePixel", "Pixle"), "l0"),
}  # fmt: skip
REFUSED = {
    "JSMA": "its targets are (label + 1) % 10 whatever the number of classes",
    "VANILA": "it changes nothing; the clean accuracy is measured anyway",
    "GN": "its noise has no budget; use RandomNoise of sg_lightning",
}
# Steps that are meant relative to eps where there is no number of steps or it does not matter.
_RELATIVE_STEP = {"FFGSM": 1.25, "RFGSM": 0.5}
_COLOUR_ONLY = {"TIFGSM", "PIFGSM", "PIFGSMPP"}


@dataclass(frozen=True)
class Torchattacks(OneClass):
    """Run an attack of torchattacks 3.5.1 (Kim, arXiv 2010.01950; MIT).

    Install it without its dependencies: it pins an old ``requests`` and asks for torchvision, and needs neither.

    Args:
        threat: ``Linf``, ``L2``, ``L1`` or ``L0`` in a box with two walls.
        algorithm: Name of a class, e.g. ``"APGD"``.
        settings: Its arguments, e.g. ``{"steps": 100, "loss": "dlr"}``.

    Raises:
        ValueError: on a class that is unknown, refused or made for another norm, or an unknown setting.
        ImportError: if torchattacks is not installed.
    """

    kind: ClassVar[str] = "torchattacks"
    package: ClassVar[str] = "torchattacks"
    command: ClassVar[str] = (
        "pip install --no-deps torchattacks==3.5.1 (with dependencies it would replace requests and add torchvision)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(self, self.algorithm, NORMS, REFUSED)
        self._check_settings([self._build], set(self._given(None, 0.0)))

    @property
    def _build(self) -> Any:
        return getattr(library("torchattacks", self.command), self.algorithm)

    def _given(self, shell: Shell | None, eps: float) -> dict[str, Any]:
        classes = 0 if shell is None else shell.oracle.classes
        norm = {"linf": "Linf", "l2": "L2"}.get(self.threat.norm)
        return {"model": shell, "eps": eps, "max_epsilon": eps, "n_classes": classes, "norm": norm, "verbose": False}

    def _perturb(self, algorithm: str, shell: Shell, y: Tensor, eps: float, seed: int) -> Tensor:
        if algorithm in _COLOUR_ONLY and shell.unit.shape[1] != 3:
            raise ValueError(
                f"{algorithm} of torchattacks is written for 3 channels, the inputs have {shell.unit.shape[1]}"
            )
        relative = _RELATIVE_STEP.get(algorithm)
        step = step_size(self._build, self.settings, eps) if relative is None else relative * eps
        attack = self._build(**self._arguments(self._build, self._given(shell, eps), {"alpha": step, "seed": seed}))
        adversarial: Tensor = attack(shell.unit, y)
        return adversarial
