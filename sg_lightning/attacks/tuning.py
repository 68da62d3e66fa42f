"""Choose an estimator's setting on validation samples, never on those that are reported."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from sg_lightning.attacks.base import Attack
from sg_lightning.attacks.oracle import Oracle
from sg_lightning.inputs import Input, batch_size
from sg_lightning.sampling import SampleGenerator, as_sample_generator

A = TypeVar("A", bound=Attack)


def tune(
    attack: A,
    oracle: Oracle,
    x: Input,
    y: Tensor,
    *,
    setting: str = "a",
    low: float = 0.35,
    high: float = 0.49,
    rounds: int = 8,
    generator: SampleGenerator | torch.Generator | None = None,
) -> A:
    """Return the attack with the value of an estimator's setting that breaks most samples, by ternary search.

    Args:
        attack: An attack with an estimator, e.g. ``PGD(Linf("8/255"), estimator=ASSG())``.
        oracle: The model behind its oracle.
        x: Validation inputs (B, ...).
        y: Labels (B,), int64.
        setting: Number to choose: ``"a"`` of ASSG, ``"gamma"`` of HART.
        low: Least value.
        high: Largest value.
        rounds: Thirds cut off, each for two runs of the attack, >= 1.
        generator: Noise, the same in every run.

    Raises:
        ValueError: if the attack has no estimator with that setting, or on an empty range.

    Source:
        Wang et al., arXiv 2512.22522: 8 rounds on [0.35, 0.49], there on test data.
    """
    estimator = attack.estimator
    known = [] if estimator is None else [f.name for f in fields(estimator)]
    if estimator is None or setting not in known:
        raise ValueError(
            f"{attack.name} has no estimator with the setting {setting!r} (it has: {', '.join(known) or 'none'}); give it "
            "one, e.g. estimator=ASSG()"
        )
    if not low < high or rounds < 1:
        raise ValueError(f"low must be below high and rounds >= 1, got low={low}, high={high}, rounds={rounds}")
    noise = as_sample_generator(generator, batch_size(x))

    def trial(value: float) -> tuple[int, A]:
        tried = replace(attack, estimator=replace(estimator, **{setting: value}))
        return int(tried.run(oracle, x, y, generator=noise).success.sum()), tried

    best, chosen = -1, attack
    for _ in range(rounds):
        third = (high - low) / 3
        (lower, with_lower), (upper, with_upper) = trial(low + third), trial(high - third)
        for broken, tried in ((lower, with_lower), (upper, with_upper)):
            if broken > best:
                best, chosen = broken, tried
        if lower > upper:
            high -= third
        else:
            low += third
    return chosen
