"""Honesty checks: signs that an attack failed rather than that a network is robust."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias

from sg_lightning.evaluation.rows import Row

Outcome = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """A check with the figures behind it. ``norm`` is empty where it concerns all of them."""

    name: str
    status: Outcome
    detail: str
    norm: str = ""


def run_checks(rows: Sequence[Row], order: Sequence[tuple[str, str, str, bool]], meta: dict[str, Any]) -> list[Check]:
    """Derive every check that the attacks of the suite allow.

    Args:
        rows: All rows; those of phase ``"check"`` hold each attack on the same samples, un-cascaded.
        order: ``(norm, headline eps, attack, whether it takes no gradients)`` from cheap to dear, without the control.
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
    for norm in dict.fromkeys(norm for norm, *_ in order):
        eps = next(e for n, e, *_ in order if n == norm)
        white, black = (
            [(a, robust[n, e, a]) for n, e, a, free in order if n == norm and free is box and robust.get((n, e, a))]
            for box in (False, True)
        )
        if white or black:
            huge = [(e, got) for (n, e, a), got in robust.items() if n == norm and e != eps]
            checks += _of_norm(norm, white, black, robust.get((norm, eps, "random"), {}), huge)
    return checks


def _share(found: dict[int, bool]) -> float:
    return sum(found.values()) / len(found) if found else 0.0


Found: TypeAlias = list[tuple[str, dict[int, bool]]]  # attack, and whether each sample is robust to it


def _of_norm(norm: str, white: Found, black: Found, control: dict[int, bool], huge: Found) -> list[Check]:
    checks = []
    samples = len((white + black)[0][1])
    slack = max(1, round(0.01 * samples)) / samples
    for (weak, before), (strong, after) in pairwise(white):
        name = "iterative at least as strong as single step" if weak == "fgsm" else "more steps at least as strong"
        status: Outcome = "pass" if _share(after) <= _share(before) + slack else "fail"
        detail = f"{weak} leaves {_share(before):.1%}, {strong} {_share(after):.1%} of {samples} samples"
        checks.append(Check(name, status, detail, norm))
    if white and black:
        checks.append(_black_box(norm, white, black))
    best, strongest = min(white + black, key=lambda item: _share(item[1]))
    if control:
        status = "pass" if _share(strongest) <= _share(control) else "fail"
        detail = (
            f"random perturbations leave {_share(control):.1%}, {best} {_share(strongest):.1%} of {samples} samples"
        )
        checks.append(Check("adversarial at least as strong as random", status, detail, norm))
    for eps, found in huge:
        share = _share(found)
        status = "pass" if share <= 0.02 else "warn" if share <= 0.1 else "fail"
        detail = f"at eps = {eps} (half the domain everywhere, or every input) {share:.1%} of {samples} samples survive"
        checks.append(Check("accuracy falls to zero as eps grows", status, detail, norm))
    return checks


def _black_box(norm: str, white: Found, black: Found) -> Check:
    """Count the samples that an attack without gradients breaks and no attack with gradients does."""
    best, strongest = min(white, key=lambda item: _share(item[1]))
    left = [i for i in strongest if all(robust.get(i, True) for _, robust in white)]
    missed = {name: sum(not robust.get(i, True) for i in left) for name, robust in black}
    total = sum(any(not robust.get(i, True) for _, robust in black) for i in left)
    status: Outcome = "pass" if total == 0 else "fail" if total >= 2 and total > 0.01 * len(strongest) else "warn"
    shares = ", ".join(f"{name} leaves {_share(robust):.1%} and breaks {missed[name]} more" for name, robust in black)
    detail = (
        f"attacks with gradients leave {len(left)} of {len(strongest)} samples (the best, {best}, {_share(strongest):.1%}); "
        f"without, {total} of these break: {shares}"
    )
    return Check("white box at least as strong as black box", status, detail, norm)


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
