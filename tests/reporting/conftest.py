"""Evaluations with known answers: which samples are right is decided here, the figures must follow."""

import numpy as np
import pytest
import torch

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


@pytest.fixture(scope="session")
def make_result():
    import sys; sys.path.insert(0, "/tmp")
    import r_fake
    return r_fake.build


@pytest.fixture(scope="session")
def results(truth, make_result):
    made = {}
    for name, right in truth.items():
        checks = [("iterative beats single step", "pass", "fine", norm) for norm in EPS]
        if name == "SR":
            checks.append(("random is weaker", "fail", "the reason of the failed check", "l2"))
        by_norm = {norm: right[norm] for norm in EPS}
        made[name] = make_result(right["clean"], by_norm, checks=checks, examples=name == "vanilla")
    return made
