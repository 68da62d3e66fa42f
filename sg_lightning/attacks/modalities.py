"""Attacks on dictionary inputs: any attack on one modality with the others held fixed, and several in turn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from sg_lightning.attacks.base import Attack, AttackResult, Goal, Progress, check_batch
from sg_lightning.attacks.losses import higher
from sg_lightning.attacks.oracle import Oracle
from sg_lightning.attacks.search import value, whole_number
from sg_lightning.inputs import Input, apply, detached, select, where
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import Joint, Modality
from sg_lightning.threats.base import SingleThreat


@dataclass(frozen=True)
class OnModality(Attack):
    """Run an attack made for single tensors on one modality of a dictionary; the others stay as they are.

    The attack sees a model of that modality alone, completed by each sample's own other modalities, so that it does there
    exactly what it does on a network of one input.

    Args:
        threat: A ``Modality`` threat.
        attack: The attack; its threat is replaced by that of the modality, its estimator becomes that of this attack.

    Raises:
        TypeError: under another threat, or if the attack does not serve that of the modality.
    """

    attack: Attack
    threat: Modality

    def __init__(self, threat: Modality, attack: Attack, *, estimator: Any = None) -> None:
        if not isinstance(threat, Modality):
            raise TypeError(
                f"OnModality needs a threat on a modality such as Modality('audio', EventFlips(3)), got {threat!r}"
            )
        if not isinstance(attack, Attack):
            raise TypeError(f"OnModality needs an attack such as PGD(...), got {attack!r}")
        super().__init__(threat, estimator=attack.estimator if estimator is None else estimator)
        inner = attack.with_threat(cast(SingleThreat, threat.threat))
        object.__setattr__(self, "attack", inner if inner.estimator is None else replace(inner, estimator=None))
        for name in ("kind", "minimal", "gradient_free"):
            object.__setattr__(self, name, getattr(inner, name))

    @property
    def title(self) -> str:
        """That of the attack: the norm says on which modality."""
        return self.attack.title

    def run(
        self,
        oracle: Oracle,
        x: Input,
        y: Tensor,
        *,
        generator: SampleGenerator | torch.Generator | None = None,
        early_drop: bool = True,
        goal: Goal = "success",
    ) -> AttackResult:
        """Attack the modality of a batch; arguments as in :meth:`Attack.run`."""
        check_batch(x, y)
        part = self.threat.part(x)
        clean = cast("dict[str, Tensor]", detached(x))
        view = oracle.using(self.estimator).seeing(self.threat.modality, clean)
        found = self.attack.run(view, part, y, generator=generator, early_drop=early_drop, goal=goal)
        oracle.classes = view.classes
        return replace(found, x_adv={**clean, self.threat.modality: cast(Tensor, found.x_adv)})

    def _search(
        self, oracle: Oracle, x: Input, y: Tensor, noise: SampleGenerator, progress: Progress, early_drop: bool
    ) -> None:
        raise NotImplementedError  # run() hands over to the attack

    def describe(self) -> dict[str, Any]:
        """Return plain data: those of the attack, since the threat says the rest."""
        swapped = {} if self.estimator is None else {"estimator": self.estimator.describe()}
        return {**self.attack.describe(), **swapped}


@dataclass(frozen=True)
class InTurn(Attack):
    """Attack the modalities of a joint threat one after the other, each with an attack made for its own norm.

    A modality is attacked from its clean values while the others stand where the attack has brought them; what it finds is
    kept where the margin rises. Ascent in coordinates: it reaches what simultaneous steps of PGD do not, since spikes and
    pixels take other steps.

    Args:
        threat: A ``Joint`` threat.
        attacks: One attack per modality of the threat, in its order; their threats are replaced by those of the modalities.
        rounds: How often each modality is attacked, >= 1.

    Raises:
        TypeError: under another threat.
        ValueError: unless there is one attack per modality, within a budget.
    """

    attacks: tuple[Attack, ...] = ()
    rounds: int = 2
    kind: ClassVar[str] = "in_turn"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("rounds", self.rounds, 1)
        if not isinstance(self.threat, Joint):
            raise TypeError(f"InTurn attacks several modalities under a Joint threat, got {self.threat!r}")
        parts = self.threat.parts
        if len(self.attacks) != len(parts):
            raise ValueError(
                f"InTurn needs one attack for each of {', '.join(n for n, _ in parts)}, got {len(self.attacks)}"
            )
        if any(attack.minimal for attack in self.attacks):
            raise ValueError("InTurn needs attacks that raise the loss within a budget, such as PGD or APGD")
        fitted = tuple(attack.with_threat(part) for attack, (_, part) in zip(self.attacks, parts, strict=True))
        object.__setattr__(self, "attacks", fitted)

    @property
    def title(self) -> str:
        """``in_turn-<rounds>(<attack>+<attack>)``."""
        return f"{self.kind}-{self.rounds}({'+'.join(attack.name for attack in self.attacks)})"

    def _search(
        self, oracle: Oracle, x: Input, y: Tensor, noise: SampleGenerator, progress: Progress, early_drop: bool
    ) -> None:
        clean = cast("dict[str, Tensor]", x)
        everyone = torch.arange(len(y), device=y.device)
        best, wrong = value(oracle, x, y, "margin")
        progress.record(everyone, x, best, wrong, 0, 1)
        point, done = detached(x), torch.zeros_like(y)
        for turn in range(self.rounds):
            for (name, _), attack in zip(cast(Joint, self.threat).threats, self.attacks, strict=True):
                index = everyone[progress.open(everyone)] if early_drop else everyone
                if len(index) == 0:
                    return
                here = cast("dict[str, Tensor]", select(point, index))
                found = attack.run(
                    oracle.seeing(name, here), clean[name][index], y[index],
                    generator=noise.fork(name, turn).select(index), early_drop=early_drop, goal=progress.goal,
                )  # fmt: skip
                moved: Input = {**here, name: cast(Tensor, found.x_adv)}
                loss, wrong = value(oracle, moved, y[index], "margin")
                open_ = progress.open(index) if progress.goal == "success" else ~progress.invalid[index]
                progress.queries[index[open_]] += found.queries[open_]
                progress.gradients[index[open_]] += found.gradients[open_]
                progress.zero_gradients[index[open_]] += found.zero_gradients[open_]
                done = done.index_add(0, index, found.iterations)
                progress.record(index, moved, loss, wrong, 0, 1)
                progress.iterations[index[open_]] = done[index[open_]]
                progress.invalid[index] |= found.invalid & ~progress.success[index]
                better = higher(loss, best[index])
                best = best.index_copy(0, index, torch.where(better, loss, best[index]))
                kept = where(better, moved, here)
                point = apply(lambda whole, part: whole.index_copy(0, index, part), point, kept)  # noqa: B023

    def describe(self) -> dict[str, Any]:
        """Return plain data: the attacks of the modalities."""
        swapped = {} if self.estimator is None else {"estimator": self.estimator.describe()}
        return {
            "attack": self.kind, "rounds": self.rounds, "attacks": [a.describe() for a in self.attacks], **swapped,
        }  # fmt: skip
