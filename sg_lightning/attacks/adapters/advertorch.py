"""Attacks of advertorch 0.2.3, imported through a shim and without its broken classes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from sg_lightning.attacks.adapters.base import OneClass, choose, library, step_size
from sg_lightning.attacks.adapters.shell import Shell

NORMS = {
    "GradientSignAttack": "linf",
    "GradientAttack": "l2",
    "LinfBasicIterativeAttack": "linf",
    "L2BasicIterativeAttack": "l2",
    "LinfPGDAttack": "linf",
    "L2PGDAttack": "l2",
    "SparseL1DescentAttack": "l1",
    "LinfMomentumIterativeAttack": "linf",
    "CarliniWagnerL2Attack": "l2",
    "ElasticNetL1Attack": "l1",
    "DDNL2Attack": "l2",
    "SinglePixelAttack": "l0",
    "LocalSearchAttack": "l0",
    "LinfSPSAAttack": "linf",
    "LinfFABAttack": "linf",
    "L2FABAttack": "l2",
    "L1FABAttack": "l1",
}
_TARGETED = "it needs a target label per sample, and attacks here get true labels only"
REFUSED = {
    "L1PGDAttack": "its projection rescales, so that it reaches 6 % of the best L1 perturbation on a linear model and "
    "reports clean accuracy as robustness; use PGD or APGD of sg_lightning, or SparseL1DescentAttack",
    "L2MomentumIterativeAttack": "it divides the perturbation by itself, and wherever a pixel has no gradient it returns "
    "NaN, which is then counted as success; use PGD(..., momentum=0.9) of sg_lightning",
    "MomentumIterativeAttack": "under L2 it divides the perturbation by itself (NaN); use LinfMomentumIterativeAttack, or "
    "PGD(..., momentum=0.9) of sg_lightning",
    "PGDAttack": "under L1 it is L1PGDAttack, which is broken; use LinfPGDAttack or L2PGDAttack",
    "FABAttack": "its norm must be that of the threat; use LinfFABAttack, L2FABAttack or L1FABAttack",
    "ChooseBestAttack": "samples that none of its attacks improves come back as all-zero images; put the attacks into a "
    "suite instead, which keeps the best",
    "LBFGSAttack": "untargeted it negates the loss but not the gradient and returns the input; targeted, " + _TARGETED,
    "JacobianSaliencyMapAttack": _TARGETED,
    "FastFeatureAttack": "it imitates the features of a guide image, which attacks here do not get",
    "SpatialTransformAttack": "it moves pixels, so that its results lie in no norm ball",
}


@dataclass(frozen=True)
class Advertorch(OneClass):
    """Run an attack of advertorch 0.2.3 (Ding, Wang, Jin, arXiv 1902.07623; LGPL-3).

    The library has had no release since 2020 and does not import on a current torch by itself. Six of its classes give
    wrong results and are refused with the reason. FAB uses the first sample's mixing weight for the whole batch.

    Args:
        threat: ``Linf``, ``L2``, ``L1`` or ``L0`` in a box with two walls.
        algorithm: Name of a class, e.g. ``"LinfPGDAttack"``.
        settings: Its arguments, e.g. ``{"nb_iter": 40}``.

    Raises:
        ValueError: on a class that is unknown, broken or made for another norm, or an unknown setting.
        ImportError: if advertorch is not installed.
    """

    kind: ClassVar[str] = "advertorch"
    package: ClassVar[str] = "advertorch"
    command: ClassVar[str] = "pip install 'sg-lightning[attack-libraries]'"

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(self, self.algorithm, NORMS, REFUSED)
        if self.settings.get("comply_with_foolbox"):
            raise ValueError(f"{self.algorithm} with comply_with_foolbox leaves the box of legal values; leave it out")
        self._check_settings([self._build], set(self._given(None, 0.0)))

    @property
    def _build(self) -> Any:
        return getattr(import_advertorch(self.command).attacks, self.algorithm)

    @staticmethod
    def _given(shell: Shell | None, eps: float) -> dict[str, Any]:
        classes = 0 if shell is None else shell.oracle.classes
        return {
            "predict": shell, "eps": eps, "num_classes": classes, "clip_min": 0.0, "clip_max": 1.0, "targeted": False,
            "loss_fn": None,
        }  # fmt: skip

    def _perturb(self, algorithm: str, shell: Shell, y: Tensor, eps: float, seed: int) -> Tensor:
        pixels = shell.unit[0, 0].numel()
        defaults = {"eps_iter": step_size(self._build, self.settings, eps), "max_pixels": min(100, pixels)}
        attack = self._build(**self._arguments(self._build, self._given(shell, eps), defaults))
        adversarial: Tensor = attack.perturb(shell.unit, y)
        return adversarial


def import_advertorch(command: str = Advertorch.command) -> ModuleType:
    """Import advertorch on a current torch, with or without torchvision.

    Two things stop it: a function that torch 1.9 removed, and an import of torchvision (which it does not declare, and
    which may be there but broken) for its defences.

    Args:
        command: What installs it, for the error.
    """
    if "advertorch.attacks" not in sys.modules:
        _without_broken_torchvision()
        with _zero_gradients():
            library("advertorch.attacks", command)
    return sys.modules["advertorch"]


@contextmanager
def _zero_gradients() -> Iterator[None]:
    """Give torch the function back while advertorch is imported."""
    # By name: `torch.autograd.gradcheck` as an attribute is the function that torch exports under the same name.
    home = importlib.import_module("torch.autograd.gradcheck")

    def zero_gradients(x: Tensor) -> None:
        """Forget the gradient of ``x``."""
        if x.grad is not None:
            x.grad = torch.zeros_like(x.grad)

    absent = not hasattr(home, "zero_gradients")
    if absent:
        home.zero_gradients = zero_gradients  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if absent:
            del home.zero_gradients


def _without_broken_torchvision() -> None:
    """Put an empty module in the place of the defences unless torchvision works."""
    try:
        importlib.import_module("torchvision")
    except Exception:  # noqa: BLE001 - a torchvision that does not fit its torch raises RuntimeError
        sys.modules.pop("torchvision", None)
        sys.modules.setdefault("advertorch.defenses", ModuleType("advertorch.defenses"))
