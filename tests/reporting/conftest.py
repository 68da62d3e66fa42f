"""Evaluations with known answers: which samples are right is decided here, the figures must follow."""

import numpy as np
import pytest
import torch

from sg_lightning.attacks import FGSM, PGD, Entry, Suite
from sg_lightning.domains import Box
from sg_lightning.evaluation import RobustnessResult, Row
from sg_lightning.threats import make_threat

SAMPLES = 200
EPS = {
    "linf": ("1/16", "2/16", "3/16"),
    "l2": ("0.25", "0.5", "0.75"),
    "l1": ("1", "1.5", "2"),
    "l0": ("1", "2", "3"),
}
HEADLINE = {"linf": "2/16", "l2": "0.5", "l1": "1.5", "l0": "2"}
# Shares of right samples, clean and at the headline budgets.
SHARES = {
    "vanilla": {"clean": 0.97, "linf": 0.20, "l2": 0.40, "l1": 0.30, "l0": 0.53},
    "SR": {"clean": 0.965, "linf": 0.45, "l2": 0.58, "l1": 0.39, "l0": 0.55},
    "AT": {"clean": 0.96, "linf": 0.65, "l2": 0.66, "l1": 0.47, "l0": 0.66},
}


def right_answers(shares, seed):
    """Bool arrays (SAMPLES,) with exactly the given shares; hard samples tend to be hard under every norm."""
    rng = np.random.default_rng(seed)
    hardness = np.random.default_rng(7).normal(size=SAMPLES)
    clean = np.zeros(SAMPLES, dtype=bool)
    clean[np.argsort(hardness)[: round(shares["clean"] * SAMPLES)]] = True
    found = {"clean": clean}
    for norm in EPS:
        order = np.argsort(hardness + 0.8 * rng.normal(size=SAMPLES) + 100 * ~clean)
        found[norm] = np.zeros(SAMPLES, dtype=bool)
        found[norm][order[: round(shares[norm] * SAMPLES)]] = True
    return found


@pytest.fixture(scope="session")
def truth():
    return {name: right_answers(shares, seed) for seed, (name, shares) in enumerate(SHARES.items())}


def budget_masks(clean, at_headline):
    """Robust at the smaller, the headline and the larger budget, each set within the one before."""
    even = np.arange(len(clean)) % 2 == 0
    larger = at_headline.copy()
    larger[np.flatnonzero(at_headline)[::2]] = False
    return at_headline | (clean & even), at_headline, larger


def build(clean, right, *, weak_pgd=(), first_id=0, steps=40, examples=False):
    """Make a result through the real class: a row per sample and attack, all figures derived from them.

    Random perturbations break every tenth sample at the largest budget only. Under the norms of ``weak_pgd`` the
    honesty checks see PGD leave more samples than FGSM.
    """
    entries = []
    for norm in right:
        for eps in EPS[norm]:
            threat = make_threat(norm, eps, Box())
            entries.append(Entry(threat, (FGSM(threat), PGD(threat, steps=steps, restarts=2)), eps == HEADLINE[norm]))
    suite = Suite("basic", tuple(entries), True)
    rows = []

    def add(k, phase, norm, eps, attack, status, size=0.0):
        tag = f"{suite.name}-{suite.hash}"
        rows.append(
            Row(
                first_id + k,
                k % 10,
                bool(clean[k]),
                phase,
                norm,
                eps,
                attack,
                status,
                size,
                1,
                1,
                1,
                0,
                tag,
                f"{first_id + k}",
            )
        )

    for k in range(len(clean)):
        add(k, "main", "", "", "clean", "skipped")
        for norm, at_headline in right.items():
            before = clean
            for i, (eps, mask) in enumerate(zip(EPS[norm], budget_masks(clean, at_headline), strict=True)):
                assert not (mask & ~before).any()
                add(k, "main", norm, eps, "fgsm", "survived" if before[k] else "skipped")
                fate = "skipped" if not before[k] else "survived" if mask[k] else "broken"
                add(k, "main", norm, eps, f"pgd-{steps}x2", fate, 0.1)
                add(k, "main", norm, eps, "random", "broken" if i == 2 and k % 10 == 0 else "survived")
                before = mask
            for attack, mask in (("fgsm", clean), (f"pgd-{steps}x2", at_headline), ("random", clean)):
                stands = (mask ^ (attack == "fgsm") if norm in weak_pgd else mask)[k]
                if k < 60:
                    add(k, "check", norm, HEADLINE[norm], attack, "survived" if stands else "broken")
    meta = {
        "seed": 3, "date": "2026-01-02T03:04:05+00:00", "classes": 10, "model": "ConvNet",
        "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    return RobustnessResult(rows, suite, meta, _examples(right) if examples else ())


def _examples(norms):
    generator = torch.Generator().manual_seed(0)
    found = []
    for norm in norms:
        for label in range(3):
            clean = torch.rand(1, 8, 8, generator=generator)
            adversarial = (clean + 0.1 * torch.randn(1, 8, 8, generator=generator)).clamp(0, 1)
            found.append({
                "norm": norm, "eps": HEADLINE[norm], "clean": clean, "adversarial": adversarial, "label": label,
                "predicted": label + 4, "size": 0.125,
            })  # fmt: skip
    return found


@pytest.fixture(scope="session")
def make_result():
    return build


@pytest.fixture(scope="session")
def results(truth):
    return {
        name: build(
            right["clean"],
            {norm: right[norm] for norm in EPS},
            weak_pgd=("l2",) if name == "SR" else (),
            examples=name == "vanilla",
        )
        for name, right in truth.items()
    }
