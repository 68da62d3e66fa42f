"""Transfer attacks: crafted on another model, judged by the attacked one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self  # typing has it from Python 3.11

from sg_lightning.attacks.answers import Counts, Health
from sg_lightning.attacks.base import Attack, Progress
from sg_lightning.attacks.oracle import Oracle
from sg_lightning.attacks.search import value
from sg_lightning.attacks.suites import Entry, Suite
from sg_lightning.fingerprint import fingerprint_model
from sg_lightning.inputs import Input
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import Threat


@dataclass(frozen=True, init=False)
class Substitute(Attack):
    """Craft with another attack on a substitute model; the attacked model is asked once per sample.

    The substitute's loss is maximised to the end (not only to its first error, which seldom carries over), through the
    attack's own gradient estimator, else that of the oracle if the substitute has spiking neurons.

    Args:
        attack: Any attack within a budget; its threat is that of the substitute attack.
        model: The substitute ``x -> logits (B, K)``: another seed, the ANN twin; on the device of the inputs.
        label: Name of the substitute in rows.

    Raises:
        ValueError: if the attack is a substitute or a minimal-norm attack, or its estimator does not fit the model.
    """

    attack: Attack
    model: Callable[..., Any] = field(repr=False)
    label: str
    kind: ClassVar[str] = "transfer"
    gradient_free: ClassVar[bool] = True

    def __init__(self, attack: Attack, model: Callable[..., Any], label: str = "substitute") -> None:
        if not isinstance(attack, Attack) or isinstance(attack, Substitute):
            raise ValueError(f"a substitute attack needs an attack on the substitute such as PGD(...), got {attack!r}")  # noqa: TRY004
        if attack.minimal:
            raise ValueError(
                f"{attack.name} looks for the smallest adversarial examples, which seldom carry over; use an attack that "
                "raises the loss inside the budget, such as PGD or APGD"
            )
        object.__setattr__(self, "attack", attack)
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "label", label)
        super().__init__(attack.threat)
        Oracle(model, estimator=attack.estimator)  # refuses what does not fit

    @property
    def title(self) -> str:
        """``transfer-<label>/<attack>``."""
        return f"{self.kind}-{self.label}/{self.attack.name}"

    @property
    def fingerprint(self) -> str:
        """Hash of the substitute's weights."""
        return fingerprint_model(self.model)

    def _search(
        self, oracle: Oracle, x: Input, y: Tensor, noise: SampleGenerator, progress: Progress, early_drop: bool
    ) -> None:
        usable = oracle.estimator is not None and oracle.estimator.refusal(self.model) is None
        estimator = self.attack.estimator or (oracle.estimator if usable else None)
        substitute = replace(oracle, model=self.model, estimator=estimator, counts=Counts(), health=Health())
        crafted = replace(self.attack, estimator=None).run(substitute, x, y, generator=noise, goal="loss")
        loss, wrong = value(oracle, crafted.x_adv, y, "margin")
        if substitute.classes != oracle.classes:
            raise ValueError(
                f"the substitute {self.label!r} has {substitute.classes} classes, the model {oracle.classes}"
            )
        progress.record(torch.arange(len(y), device=y.device), crafted.x_adv, loss, wrong, 1, 1)

    def with_threat(self, threat: Threat) -> Self:
        """Return the same attack under another threat."""
        return type(self)(self.attack.with_threat(threat), self.model, self.label)

    def describe(self) -> dict[str, Any]:
        """Return plain data: the attack, the label and the hash of the substitute's weights."""
        return {
            "attack": self.kind,
            "label": self.label,
            "weights": self.fingerprint,
            "crafted": self.attack.describe(),
        }


def with_substitutes(suite: Suite, substitutes: Mapping[str, Callable[..., Any]]) -> Suite:
    """Add to every entry its strongest gradient attack, crafted on each substitute.

    Args:
        suite: A resolved suite; its hash changes with the substitutes' weights.
        substitutes: Models by label (letters, digits, ``-``, ``_`` and ``.``).

    Raises:
        ValueError: on a label with other characters, or a norm without an attack that raises the loss by gradients.
        TypeError: on a substitute that is no function.
    """
    for label, model in substitutes.items():
        if not callable(model):
            raise TypeError(f"the substitute {label!r} must be a model x -> logits (B, K), got {type(model).__name__}")
        if not label or not label.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise ValueError(
                f"name substitutes with letters, digits, '-', '_' and '.', e.g. 'ann' or 'seed2', got {label!r}"
            )
    entries = [
        replace(entry, attacks=(*entry.attacks, *(_transferred(entry, model, k) for k, model in substitutes.items())))
        for entry in suite.entries
    ]
    return replace(suite, entries=tuple(entries))


def _transferred(entry: Entry, model: Callable[..., Any], label: str) -> Substitute:
    attack = entry.strongest
    if attack is None:
        raise ValueError(
            f"the suite has no attack under {entry.threat.norm} that could be crafted on the substitute {label!r}; add "
            "one that raises the loss by gradients, such as pgd or apgd, or leave substitutes= out"
        )
    if attack.estimator is not None and attack.estimator.refusal(model) is not None:
        attack = replace(attack, estimator=None)  # an ANN has no surrogate to replace
    return Substitute(attack, model, label)
