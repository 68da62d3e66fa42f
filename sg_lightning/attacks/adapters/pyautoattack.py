"""The attacks of AutoAttack as its authors publish them (pyautoattack 0.2.0)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sg_lightning.attacks.adapters.base import ForeignAttack, library
from sg_lightning.attacks.adapters.shell import Shell

# Name: module, class, and what AutoAttack's version "standard" sets.
PARTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "apgd-ce": ("autopgd_base", "APGDAttack", {"loss": "ce"}),
    "apgd-dlr": ("autopgd_base", "APGDAttack", {"loss": "dlr"}),
    "apgd-t": ("autopgd_base", "APGDAttack_targeted", {"n_target_classes": 9}),
    "fab": ("fab_pt", "FABAttack_PT", {}),
    "fab-t": ("fab_pt", "FABAttack_PT", {"targeted": True, "n_target_classes": 9}),
    "square": ("square", "SquareAttack", {"n_queries": 5000, "p_init": 0.8, "resc_schedule": False}),
}
# Under L1 the standard version restarts APGD, starts from larger budgets and takes fewer targets.
L1_PARTS: dict[str, dict[str, Any]] = {
    "apgd-ce": {"n_restarts": 5, "use_largereps": True},
    "apgd-dlr": {"n_restarts": 5, "use_largereps": True},
    "apgd-t": {"use_largereps": True, "n_target_classes": 5},
}
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


@dataclass(frozen=True)
class PyAutoAttack(ForeignAttack):
    """Run parts of AutoAttack (pyautoattack 0.2.0), each on the samples that still stand, with its standard settings.

    With the default ``attacks`` and no settings this is AutoAttack's version "standard", without its own checks.

    Args:
        threat: ``Linf``, ``L2`` or ``L1`` in a box with two walls.
        attacks: Names out of apgd-ce, apgd-dlr, apgd-t, fab, fab-t and square, in the order to run them.
        settings: Arguments of the classes behind them, each for all that take it: ``{"n_iter": 20, "n_queries": 500}``.

    Raises:
        ValueError: on an unknown name or setting, another norm, or a model with too few classes for the DLR loss.
        ImportError: if pyautoattack is not installed.

    Source:
        Croce and Hein, arXiv 2003.01690; under L1 arXiv 2103.01208. Square: Andriushchenko et al., arXiv 1912.00049.
    """

    attacks: tuple[str, ...] = ("apgd-ce", "apgd-t", "fab-t", "square")
    kind: ClassVar[str] = "pyautoattack"
    package: ClassVar[str] = "pyautoattack"
    command: ClassVar[str] = "pip install 'sg-lightning[attack-libraries]'"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threat.norm not in NORMS:
            raise ValueError(f"AutoAttack knows linf, l2 and l1, got a threat under {self.threat.norm}")
        if isinstance(self.attacks, str) or not self.attacks or set(self.attacks) - set(PARTS):
            raise ValueError(f"attacks must be a sequence of names out of {', '.join(PARTS)}, got {self.attacks!r}")
        object.__setattr__(self, "attacks", tuple(self.attacks))
        self._check_settings(
            [self._build(name) for name in self.attacks], {*self._given(None, 0.0), "loss", "targeted"}
        )

    @property
    def algorithms(self) -> tuple[str, ...]:
        """The names in their order."""
        return self.attacks

    def _build(self, algorithm: str) -> Any:
        module, name, _ = PARTS[algorithm]
        return getattr(library(f"pyautoattack.{module}", self.command), name)

    def _given(self, shell: Shell | None, eps: float) -> dict[str, Any]:
        device = None if shell is None else shell.unit.device
        return {
            "predict": shell, "eps": eps, "norm": NORMS[self.threat.norm], "device": device, "verbose": False,
            "is_tf_model": False, "logger": None, "loss_fn": None,
        }  # fmt: skip

    def _perturb(self, algorithm: str, shell: Shell, y: Tensor, eps: float, seed: int) -> Tensor:
        classes = shell.oracle.classes
        needed = {"apgd-dlr": 3, "apgd-t": 4}.get(algorithm, 2)
        if classes < needed:
            raise ValueError(f"{algorithm} needs a model with at least {needed} classes, this one has {classes}")
        if algorithm == "square" and self.threat.norm != "linf" and min(shell.unit.shape[2:]) < 5:
            raise ValueError(
                f"square under {self.threat.norm} needs images of at least 5 x 5, got {tuple(shell.unit.shape[2:])}"
            )
        defaults = {**PARTS[algorithm][2], "seed": seed}
        if self.threat.norm == "l1":
            defaults |= L1_PARTS.get(algorithm, {})
        fixed = {key: value for key, value in defaults.items() if key in ("loss", "targeted")}
        arguments = self._arguments(self._build(algorithm), {**self._given(shell, eps), **fixed}, defaults)
        if "n_target_classes" in arguments:
            arguments["n_target_classes"] = min(arguments["n_target_classes"], classes - 1)
        adversarial: Tensor = self._build(algorithm)(**arguments).perturb(shell.unit, y)
        return adversarial
