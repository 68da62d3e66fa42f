"""Honesty checks: signs that an attack failed rather than that a network is robust."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from sg_lightning.evaluation.rows import Row

Outcome = Literal["pass", "warn", "fail"]
SINGLE_STEP = ("fgsm", "rfgsm")


@dataclass(frozen=True)
class Check:
    """A check with the figures behind it. ``norm`` is empty where it concerns all of them."""

    name: str
    status: Outcome
    detail: str
    norm: str = ""


@dataclass(frozen=True)
class Tried:
    """An attack of the suite at a headline budget: its name in the rows, its settings, whether it is a black box one."""

    norm: str
    eps: str
    name: str
    settings: dict[str, Any]
    gradient_free: bool = False

    def without(self, *keys: str) -> str:
        """Identify what else is set: attacks that differ in ``keys`` only share it."""
        return json.dumps({k: v for k, v in self.settings.items() if k not in keys}, sort_keys=True, default=str)


def run_checks(rows: Sequence[Row], tried: Sequence[Tried], meta: dict[str, Any]) -> list[Check]:
    """Derive every check that the attacks of the suite allow.

    Args:
        rows: All rows; those of phase ``"check"`` hold each attack on the same samples, un-cascaded.
        tried: The attacks from cheap to dear, without the control.
        meta: ``stochastic``, ``eot``, ``votes``, ``classes``.
    """
    checks = [_gradients(rows), *_randomness(meta), _clean(rows, meta)]
    invalid = {row.id for row in rows if row.status == "invalid"}
    checks.append(
        Check(
            "all examples valid", "fail" if invalid else "pass",
            f"{len(invalid)} samples had a non-finite gradient or an example outside its threat; they count as not robust",
        )
    )  # fmt: skip
    robust: dict[tuple[str, str, str], dict[int, bool]] = defaultdict(dict)
    for row in rows:
        if row.phase == "check":
            robust[row.norm, row.eps, row.attack][row.id] = row.clean and row.status == "survived"
    for norm in dict.fromkeys(attack.norm for attack in tried):
        mine = [attack for attack in tried if attack.norm == norm]
        eps = mine[0].eps
        found = [(attack, robust[norm, eps, attack.name]) for attack in mine if robust.get((norm, eps, attack.name))]
        if found:
            huge = [(e, got) for (n, e, _), got in robust.items() if n == norm and e != eps]
            checks += _of_norm(norm, found, robust.get((norm, eps, "random"), {}), huge)
    return checks


Found = tuple[Tried, dict[int, bool]]  # an attack, and which of the checked samples it left standing


def _share(found: dict[int, bool]) -> float:
    return sum(found.values()) / len(found) if found else 0.0


def _slack(samples: int) -> float:
    """One sample, or 1 %: what the rounding of float32 may change."""
    return max(1, round(0.01 * samples)) / samples


def _of_norm(
    norm: str, attacks: list[Found], control: dict[int, bool], huge: list[tuple[str, dict[int, bool]]]
) -> list[Check]:
    samples = len(attacks[0][1])
    strongest = min(attacks, key=lambda item: _share(item[1]))
    checks = [
        *_single_steps(norm, attacks),
        *_steps(norm, attacks),
        *_estimators(norm, attacks),
        *_black_box(norm, attacks),
    ]
    if control:
        status: Outcome = "pass" if _share(strongest[1]) <= _share(control) else "fail"
        detail = (
            f"random perturbations leave {_share(control):.1%}, {strongest[0].name} {_share(strongest[1]):.1%} of "
            f"{samples} samples"
        )
        checks.append(Check("adversarial at least as strong as random", status, detail, norm))
    for eps, found in huge:
        share = _share(found)
        status = "pass" if share <= 0.02 else "warn" if share <= 0.1 else "fail"
        detail = f"at eps = {eps} (half the domain everywhere, or every input) {share:.1%} of {samples} samples survive"
        checks.append(Check("accuracy falls to zero as eps grows", status, detail, norm))
    return checks


def _black_box(norm: str, attacks: list[Found]) -> list[Check]:
    """Count the samples that an attack without gradients of the model breaks and no attack with gradients does."""
    white, black = ([found for found in attacks if found[0].gradient_free is free] for free in (False, True))
    if not white or not black:
        return []
    best = min(white, key=lambda item: _share(item[1]))
    standing = [i for i in best[1] if all(left[i] for _, left in white)]
    more = {attack.name: sum(not left[i] for i in standing) for attack, left in black}
    total = sum(not all(left[i] for _, left in black) for i in standing)
    samples = len(best[1])
    status: Outcome = "pass" if total == 0 else "warn" if total <= _slack(samples) * samples else "fail"
    each = ", ".join(
        f"{attack.name} leaves {_share(left):.1%} and breaks {more[attack.name]}" for attack, left in black
    )
    detail = (
        f"attacks with gradients leave {len(standing)} of {samples} samples (the best, {best[0].name}, "
        f"{_share(best[1]):.1%}); without, {total} of these break: {each}"
    )
    return [Check("white box at least as strong as black box", status, detail, norm)]


def _single_steps(norm: str, attacks: list[Found]) -> list[Check]:
    """Compare the best single step with the best iterated attack."""
    single = [found for found in attacks if found[0].settings["attack"] in SINGLE_STEP]
    iterated = [found for found in attacks if "steps" in found[0].settings]
    if not single or not iterated:
        return []
    weak, strong = (min(group, key=lambda item: _share(item[1])) for group in (single, iterated))
    samples = len(weak[1])
    status: Outcome = "pass" if _share(strong[1]) <= _share(weak[1]) + _slack(samples) else "fail"
    detail = (
        f"{weak[0].name} leaves {_share(weak[1]):.1%}, {strong[0].name} {_share(strong[1]):.1%} of {samples} samples"
    )
    return [Check("iterative at least as strong as single step", status, detail, norm)]


def _steps(norm: str, attacks: list[Found]) -> list[Check]:
    """Compare attacks that differ in the number of steps and restarts only."""
    checks = []
    for group in _groups(attacks, "steps", "restarts"):
        group.sort(key=lambda item: item[0].settings.get("steps", 0) * item[0].settings.get("restarts", 1))
        for (weak, before), (strong, after) in pairwise(group):
            status: Outcome = "pass" if _share(after) <= _share(before) + _slack(len(before)) else "fail"
            detail = (
                f"{weak.name} leaves {_share(before):.1%}, {strong.name} {_share(after):.1%} of {len(before)} samples"
            )
            checks.append(Check("more steps at least as strong", status, detail, norm))
    return checks


def _estimators(norm: str, attacks: list[Found]) -> list[Check]:
    """Compare the best gradient estimator with all of them together: where they disagree, others may find more."""
    checks = []
    for group in _groups(attacks, "estimator"):
        together = {i: all(left[i] for _, left in group) for i in group[0][1]}
        best = min(_share(left) for _, left in group)
        gap = best - _share(together)
        status: Outcome = "pass" if gap <= 0.03 else "warn" if gap <= 0.1 else "fail"
        each = ", ".join(f"{attack.name} {_share(left):.1%}" for attack, left in group)
        detail = f"left by {each}; by all together {_share(together):.1%} of {len(together)} samples"
        checks.append(Check("gradient estimators agree", status, detail, norm))
    return checks


def _groups(attacks: list[Found], *keys: str) -> list[list[Found]]:
    """Put attacks together that differ in ``keys`` only; groups of one are left out."""
    found: dict[str, list[Found]] = defaultdict(list)
    for attack, left in attacks:
        found[attack.without(*keys)].append((attack, left))
    return [group for group in found.values() if len(group) > 1]


def _gradients(rows: Sequence[Row]) -> Check:
    taken, zero = sum(row.gradients for row in rows), sum(row.zero_gradients for row in rows)
    share = zero / taken if taken else 0.0
    return Check(
        "few zero gradients", "pass" if share <= 0.01 else "warn" if share <= 0.1 else "fail",
        f"{share:.1%} of {taken} input gradients were exactly zero; an attack cannot move where there is none",
    )  # fmt: skip


def _randomness(meta: dict[str, Any]) -> list[Check]:
    if not meta.get("stochastic"):
        return []
    eot, votes = meta.get("eot", 1), meta.get("votes", 1)
    detail = f"the model is random; gradients were averaged over {eot} and decisions over {votes} draws"
    status: Outcome = "pass" if eot >= 10 and votes >= 3 else "fail"
    return [Check("randomness averaged out", status, detail + " (needed: eot >= 10, votes >= 3)")]


def _clean(rows: Sequence[Row], meta: dict[str, Any]) -> Check:
    clean = {row.id: row.clean for row in rows if row.phase == "main"}
    share, chance = _share(clean), 1 / max(2, meta.get("classes", 2))
    status: Outcome = "pass" if share > 1.5 * chance else "warn"
    return Check("clean accuracy above chance", status, f"{share:.1%} of {len(clean)} samples, chance is {chance:.1%}")
