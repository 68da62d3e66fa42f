"""Every adversarial example is checked again before it counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sg_lightning.attacks.oracle import Oracle
from sg_lightning.inputs import Input, apply
from sg_lightning.threats import Threat


@dataclass(frozen=True)
class Verdict:
    """Per sample, bool (B,): ``inside`` the threat, the domain and finite; ``misclassified`` by a clean forward."""

    misclassified: Tensor
    inside: Tensor

    @property
    def counts(self) -> Tensor:
        """Whether the example breaks the sample, bool (B,)."""
        return self.misclassified & self.inside


def verify(oracle: Oracle, threat: Threat, x: Input, x_adv: Input, y: Tensor) -> Verdict:
    """Check adversarial examples with nothing swapped in the model, by majority of the oracle's votes."""
    clean = Oracle(oracle.model, votes=oracle.votes, room=oracle.room, autocast=oracle.autocast)
    inside = threat.contains(x_adv, x)
    finite = apply(lambda t: torch.nan_to_num(t, 0.0, 0.0, 0.0), x_adv)
    wrong = clean.misclassified(finite, y)
    oracle.counts.forwards += clean.counts.forwards
    return Verdict(wrong, inside)
