"""How far each sample is from its nearest adversarial example: one run, the accuracy at every budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sg_lightning.attacks import Attack, Oracle, verify
from sg_lightning.inputs import Input
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import parse_eps
from sg_lightning.threats.base import TOLERANCE


def minimal_distances(
    model: Callable[..., Any], x: Input, y: Tensor, attack: Attack, *, batch_size: int = 128, seed: int = 0
) -> Tensor:
    """Return the size of the smallest adversarial example that a minimal-norm attack finds for each sample.

    Every example is checked again by a clean forward pass before it counts.

    Args:
        model: Any function ``x -> logits (B, K)``; modules are left exactly as they are.
        x: Clean inputs (N, ...).
        y: Labels (N,).
        attack: ``DDN``, ``FMN`` or ``SigmaZero``; the eps of its threat does not matter.
        batch_size: Largest number of samples per model call.
        seed: Seed of the samples' randomness.

    Returns:
        float64 (N,): 0 for samples that are misclassified to begin with, infinite where nothing was found, NaN where a
        gradient was not finite.

    Raises:
        TypeError: if the attack is not a minimal-norm attack.
    """
    if not attack.minimal:
        raise TypeError(f"{attack.name} searches inside one budget; minimal distances need DDN, FMN or SigmaZero")
    oracle = Oracle(model, batch_size=batch_size)
    found = attack.run(oracle, x, y, generator=SampleGenerator.from_ids(seed, range(len(y))))
    wrong = verify(oracle, attack.threat, x, found.x_adv, y).misclassified
    sizes = torch.where(wrong, attack.threat.size(found.x_adv, x).double(), torch.inf)
    return torch.where(found.invalid, torch.nan, sizes)


def accuracy_at(distances: Tensor, eps: float | str) -> float:
    """Return the share of samples whose distance is larger than ``eps``; NaN counts as broken.

    Args:
        distances: As from :func:`minimal_distances`, (N,).
        eps: Budget in the unit of the distances, a number or a ratio such as ``"8/255"``; 0 for the clean accuracy.
    """
    return float((distances > parse_eps(eps) * (1 + TOLERANCE)).double().mean())
