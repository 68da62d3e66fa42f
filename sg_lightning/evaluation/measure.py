"""Measure the robustness of any model on any test set."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sg_lightning.attacks import BPTT, Oracle, Suite, load_suite
from sg_lightning.domains import Domain
from sg_lightning.evaluation.data import Source, check_samples, fingerprint_model, fingerprint_samples, to_device
from sg_lightning.evaluation.engine import RobustnessRun, spread_ids
from sg_lightning.evaluation.result import RobustnessResult
from sg_lightning.evaluation.rows import Row, RowStore
from sg_lightning.inputs import Input, select
from sg_lightning.threats import Budgets


def evaluate(
    model: Callable[..., Any],
    data: Any,
    suite: str | Path | Suite = "basic",
    *,
    budgets: Budgets | None = None,
    domain: Domain | None = None,
    max_samples: int | None = None,
    batch_size: int = 128,
    out: str | Path | None = None,
    seed: int = 0,
    estimator: BPTT | None = None,
    eot: int = 1,
    votes: int = 1,
    check_samples_count: int = 128,
    progress: bool = True,
) -> RobustnessResult:
    """Attack every test sample under every norm of a suite and report what is left.

    Args:
        model: Any function ``x -> logits (B, K)``; modules are left exactly as they are.
        data: ``(x, y)`` tensors, a sequential ``DataLoader``, or a data module.
        suite: ``"quick"``, ``"basic"``, the path of a YAML file, or a resolved suite.
        budgets: Budgets per norm; by default those of the data module.
        domain: Legal values; by default that of the data module, else [0, 1].
        max_samples: Only the first so many samples.
        batch_size: Samples attacked together (loaders keep their own). Does not change the result.
        out: Folder for rows as they are made, and for the whole result at the end (``RobustnessResult.load(out)``);
            an interrupted run goes on from there.
        seed: Seed of random starts and controls.
        estimator: Gradient estimator of the attacks for spiking neurons; ``None``: the training surrogate.
        eot: Gradients averaged per step, for stochastic models.
        votes: Forward passes whose majority decides, for stochastic models.
        check_samples_count: Samples on which all attacks run, for the honesty checks; 0 switches them off.
        progress: Show a progress bar on stderr.

    Returns:
        The result; also in ``out`` if that is given.

    Raises:
        ValueError: on bad data, labels, budgets, an unknown suite, or an ``out`` that holds another run.
        TypeError: if the model does not return one tensor of logits.
    """
    if batch_size < 1 or check_samples_count < 0:
        raise ValueError(
            f"batch_size must be >= 1 and check_samples_count >= 0, got {batch_size}, {check_samples_count}"
        )
    source = Source(data, max_samples)
    domain = domain or source.domain or Domain()
    source.check(domain)
    budgets = budgets or source.budgets or {}
    resolved = load_suite(suite, budgets, domain)
    oracle = Oracle(model, estimator=estimator, eot=eot, votes=votes)
    device = next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else None
    batches = source.batches(batch_size)
    first = next(batches)
    check_samples(first[0], first[1], domain)
    _ask_one(oracle, first[0], device)
    store = None
    if out is not None:
        fingerprint = {
            "weights": fingerprint_model(model), "samples": len(source), "suite": f"{resolved.name}-{resolved.hash}",
            "seed": seed, "estimator": str(estimator), "eot": eot, "votes": votes, "checks": check_samples_count,
        }  # fmt: skip
        store = RowStore(out, fingerprint)
    run = RobustnessRun(
        oracle, resolved, seed=seed, check_ids=spread_ids(len(source), check_samples_count),
        examples=store.examples() if store is not None else (),
    )  # fmt: skip
    rows = _finished(store.read(), run) if store is not None else []
    done = {row.id: row.data for row in rows}
    with tqdm(
        total=len(source), initial=len(done), desc=f"attacks ({resolved.name})", unit="sample", disable=not progress
    ) as bar:
        for x, y, ids in chain([first], batches):
            check_samples(x, y, domain)
            _refuse_other_data(done, x, y, ids)
            todo = torch.tensor([k for k, i in enumerate(ids.tolist()) if i not in done], dtype=torch.int64)
            if len(todo) == 0:
                continue
            x, y = select(x, todo), y[todo]
            if device is not None:
                x, y = to_device(x, device), y.to(device)
            new = run.batch(x, y, ids[todo].tolist())
            if store is not None:
                store.append(new, run.examples)
            rows += new
            bar.update(len(todo))
    reasons = {norm: budgets[norm].reason for norm in resolved.norms if norm in budgets and budgets[norm].reason}
    result = run.result(
        rows, domain=str(domain), resumed_samples=len(done), **({"headline budgets": reasons} if reasons else {})
    )
    if out is not None:
        result.save(out)
    return result


def _ask_one(oracle: Oracle, x: Input, device: torch.device | None) -> None:
    """Ask for the logits of one sample: a model that cannot be attacked is refused before any work."""
    one = select(x, torch.arange(1))
    oracle.logits(one if device is None else to_device(one, device))


def _refuse_other_data(done: dict[int, str], x: Input, y: Tensor, ids: Tensor) -> None:
    """Raise ``ValueError`` if a finished sample is not the one that was attacked."""
    if not done:
        return
    for i, data in zip(ids.tolist(), fingerprint_samples(x, y.long()), strict=True):
        if done.get(i, data) != data:
            raise ValueError(
                f"sample {i} is not the one whose rows are in out=: the data, their order or their preprocessing "
                "changed; choose another out= or delete it"
            )


def _finished(rows: list[Row], run: RobustnessRun) -> list[Row]:
    """Keep the samples whose rows are complete; a killed run may have left some of a batch."""
    main: dict[int, int] = {}
    for row in rows:
        main[row.id] = main.get(row.id, 0) + (row.phase == "main")
    checked = {row.id for row in rows if row.phase == "check"}
    complete = {i for i, n in main.items() if n == run.attacks_per_sample and (i not in run.check_ids or i in checked)}
    return [row for row in rows if row.id in complete]
