"""The same attack in every library, called as its users call it: no adapter of ours in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sg_lightning.attacks import ATTACKS, Oracle, make_attack
from sg_lightning.attacks.adapters.advertorch import import_advertorch
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import SingleThreat

Run = Callable[[nn.Module, Tensor, Tensor, int], Tensor]
OURS = "sg_lightning"
SLOW = ("ART", f"{OURS}, no early drop")
PACKAGES = ("advertorch", "torchattacks", "foolbox", "pyautoattack", "adversarial-robustness-toolbox")
_NAMES = {"linf": "Linf", "l2": "L2", "l1": "L1"}
_ORDERS = {"linf": np.inf, "l2": 2, "l1": 1}


class Counting(nn.Module):
    """Count the samples that go through a model, forwards and (as seen by the input) backwards."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        self.forwards += len(x)
        if x.requires_grad:
            x = x.view_as(x)  # a hook on the view is called once per backward pass through it
            x.register_hook(self._backward)
        return self.model(x)

    def _backward(self, grad: Tensor) -> None:
        self.backwards += len(grad)


@dataclass(frozen=True)
class Event:
    """One line of the table.

    Attributes:
        method: ``"pgd"`` (step 2.5 eps / steps, one random start) or ``"apgd"``.
        norm: Norm of the threat.
        loss: ``"ce"`` or ``"dlr"``.
        steps: Number of steps.
    """

    method: str
    norm: str
    loss: str
    steps: int

    @property
    def title(self) -> str:
        """Name in tables."""
        norm = {"linf": "L∞"}.get(self.norm, self.norm.upper())
        return f"{self.method.upper()}-{self.steps} {norm}" + (f" {self.loss.upper()}" if self.method == "apgd" else "")


def contestants(event: Event, threat: SingleThreat) -> dict[str, Run]:
    """Return who can run an event, ours first; libraries that are not installed are left out."""
    makers = {
        "advertorch": _advertorch, "torchattacks": _torchattacks, "foolbox": _foolbox, "pyautoattack": _pyautoattack,
        "art": _art,
    }  # fmt: skip
    found = _ours(event, threat)
    for name, make in makers.items():
        if find_spec(name) is not None:
            found |= make(event, threat.budget)
    return found


def _ours(event: Event, threat: SingleThreat) -> dict[str, Run]:
    if event.method not in ATTACKS:
        return {}
    settings: dict[str, Any] = {"steps": event.steps, "loss": event.loss}
    if event.method == "pgd" and event.norm != "l1":
        settings["step_size"] = 2.5 * threat.budget / event.steps
    attack = make_attack(threat, event.method, **settings)

    def run(early_drop: bool) -> Run:
        def attacked(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
            noise = SampleGenerator.from_ids(seed, range(len(y)))
            return attack.run(Oracle(model), x, y, generator=noise, early_drop=early_drop).x_adv

        return attacked

    return {OURS: run(True), f"{OURS}, no early drop": run(False)}


def _advertorch(event: Event, eps: float) -> dict[str, Run]:
    attacks = import_advertorch().attacks
    names = {
        ("pgd", "linf"): {"": "LinfPGDAttack"},
        ("pgd", "l2"): {"": "L2PGDAttack"},
        ("pgd", "l1"): {" SparseL1Descent": "SparseL1DescentAttack", " L1PGD (refused)": "L1PGDAttack"},
    }.get((event.method, event.norm), {})

    def made(name: str) -> Run:
        def run(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
            torch.manual_seed(seed)
            step = 2.5 * eps / event.steps
            return getattr(attacks, name)(model, eps=eps, nb_iter=event.steps, eps_iter=step).perturb(x, y)

        return run

    return {f"advertorch{suffix}": made(name) for suffix, name in names.items()}


def _torchattacks(event: Event, eps: float) -> dict[str, Run]:
    import torchattacks

    if event.norm == "l1":
        return {}

    def run(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        if event.method == "apgd":
            norm = _NAMES[event.norm]
            return torchattacks.APGD(model, norm=norm, eps=eps, steps=event.steps, loss=event.loss, seed=seed)(x, y)
        name = "PGD" if event.norm == "linf" else "PGDL2"
        return getattr(torchattacks, name)(model, eps=eps, alpha=2.5 * eps / event.steps, steps=event.steps)(x, y)

    return {"torchattacks": run}


def _foolbox(event: Event, eps: float) -> dict[str, Run]:
    import foolbox

    if event.method != "pgd":
        return {}
    name = {"linf": "LinfPGD", "l2": "L2PGD", "l1": "SparseL1DescentAttack"}[event.norm]

    def run(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        attack = getattr(foolbox.attacks, name)(steps=event.steps, rel_stepsize=2.5 / event.steps, random_start=True)
        return attack(foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device), x, y, epsilons=eps)[1]

    return {"foolbox SparseL1Descent" if event.norm == "l1" else "foolbox": run}


def _pyautoattack(event: Event, eps: float) -> dict[str, Run]:
    from pyautoattack.autopgd_base import APGDAttack

    if event.method != "apgd":
        return {}

    def run(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        norm = _NAMES[event.norm]
        return APGDAttack(model, n_iter=event.steps, norm=norm, eps=eps, loss=event.loss, seed=seed).perturb(x, y)

    return {"pyautoattack": run}


def _art(event: Event, eps: float) -> dict[str, Run]:
    from art.attacks.evasion import AutoProjectedGradientDescent, ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    def run(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        np.random.seed(seed)
        classes = 10
        classifier = PyTorchClassifier(
            model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), classes, clip_values=(0.0, 1.0), device_type="cpu"
        )
        shared = {
            "norm": _ORDERS[event.norm],
            "eps": eps,
            "max_iter": event.steps,
            "batch_size": len(x),
            "verbose": False,
        }
        if event.method == "apgd":
            loss = {"ce": "cross_entropy", "dlr": "difference_logits_ratio"}[event.loss]
            attack = AutoProjectedGradientDescent(
                classifier, eps_step=2 * eps, nb_random_init=1, loss_type=loss, **shared
            )
        else:
            attack = ProjectedGradientDescentPyTorch(
                classifier, eps_step=2.5 * eps / event.steps, num_random_init=1, **shared
            )
        labels = nn.functional.one_hot(y, classes).numpy()
        return torch.from_numpy(attack.generate(x.numpy(), labels))

    return {"ART": run}
