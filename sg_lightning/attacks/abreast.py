"""Attacks that differ in their estimator only: as one batch where few samples are left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sg_lightning.attacks.base import Attack, AttackResult
from sg_lightning.attacks.estimators import BPTT, Estimator
from sg_lightning.attacks.estimators.beside import Each, OtherSamples, can_be_beside
from sg_lightning.attacks.oracle import Oracle
from sg_lightning.attacks.room import cheap
from sg_lightning.attacks.runs import Together
from sg_lightning.inputs import Input, batch_size, select
from sg_lightning.sampling import SampleGenerator


def companions(attack: Attack, following: Sequence[Attack], oracle: Oracle, y: Tensor) -> list[Attack]:
    """Return those of the ``following`` attacks that may as well run along with one on samples of the labels ``y``.

    They come right after it and differ in their estimator only, and all rows together cost hardly more than a single one.
    None do where iterations are captured: several estimators in one pass cannot be.
    """
    room = cheap(y.device) // max(len(y), 1) - 1
    if (
        room < 1
        or oracle.room.alone
        or oracle.record is not None
        or not vars(type(attack)).get("abreast")  # said by the class itself: one made from it may do other things
        or oracle.stochastic
        or not can_be_beside(oracle.model)
    ):
        return []
    bare, passes = replace(attack, estimator=None), len(_estimator(attack, oracle).parts)
    found: list[Attack] = []
    for other in following[:room]:
        own = _estimator(other, oracle)
        alike = type(other) is type(attack) and replace(other, estimator=None) == bare
        if not (alike and own.per_sample and len(own.parts) == passes):
            break
        found.append(other)
    return found if _estimator(attack, oracle).per_sample else []


def _estimator(attack: Attack, oracle: Oracle) -> Estimator:
    own = oracle.estimator if attack.estimator is None else attack.estimator
    return own if isinstance(own, Estimator) else BPTT()


def run_abreast(
    attacks: Sequence[Attack], oracle: Oracle, x: Input, y: Tensor, noises: Sequence[SampleGenerator]
) -> list[tuple[AttackResult, Tensor]]:
    """Run ``attacks``, :func:`companions` of each other, on the same samples.

    What comes of it is as if they ran one after the other, each on the samples that the ones before have left.

    Args:
        attacks: The attacks.
        oracle: The model.
        x: Clean inputs (B, ...).
        y: Labels (B,).
        noises: Randomness of the samples, for each attack.

    Returns:
        Nothing, if a neuron of the model sees other samples than the model does; else what each attack found, and for which
        samples it was given up, bool (B,), because an earlier one had broken them: there it means nothing.
    """
    attacks[0].threat.check(x)
    size = batch_size(x)
    rows = torch.arange(size, device=y.device).repeat(len(attacks))
    whole = select(x, rows)
    progress = Together(whole, "success", len(attacks))
    joint = oracle.using(Each(tuple(_estimator(attack, oracle) for attack in attacks), size))
    noise = SampleGenerator(torch.cat([own.keys for own in noises]))
    try:
        with joint.attacking(fold=True):
            attacks[0]._search(joint, whole, y[rows], noise, progress, early_drop=True)
    except OtherSamples:
        oracle.room.alone = True
        return []
    result, given_up = progress.result(), torch.zeros(size, dtype=torch.bool, device=y.device)
    found = []
    for places in torch.arange(len(rows), device=y.device).split(size):
        found.append((result.of(places), given_up))
        given_up = given_up | (result.success | result.invalid)[places]
    return found
