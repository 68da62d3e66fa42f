"""Measure the robustness of any model on any test set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sg_lightning.attacks import Estimator, Oracle, Suite, load_suite, with_substitutes
from sg_lightning.attacks.capture import recorder
from sg_lightning.domains import Domains, domains_text
from sg_lightning.evaluation.adversarial import Keep
from sg_lightning.evaluation.data import Source, check_samples, data_name, legal_domain, to_device
from sg_lightning.evaluation.progress import TqdmBar
from sg_lightning.evaluation.result import RobustnessResult
from sg_lightning.evaluation.session import Session, process
from sg_lightning.inputs import Input, select
from sg_lightning.threats import Budgets


def evaluate(
    model: Callable[..., Any],
    data: Any,
    suite: str | Path | Suite = "basic",
    *,
    budgets: Budgets | None = None,
    domain: Domains | None = None,
    max_samples: int | None = None,
    batch_size: int = 128,
    out: str | Path | None = None,
    seed: int = 0,
    estimator: Estimator | None = None,
    eot: int = 1,
    votes: int = 1,
    substitutes: Mapping[str, Callable[..., Any]] | None = None,
    check_samples_count: int = 128,
    keep: Keep = "few",
    cuda_graphs: bool = False,
    progress: bool = True,
) -> RobustnessResult:
    """Attack every test sample under every norm of a suite and report what is left.

    In a process group (``torchrun``, a Lightning strategy) every process calls it with the same arguments, attacks its
    share of the samples and gets the whole result.

    Args:
        model: Any function ``x -> logits (B, K)``; modules are left exactly as they are.
        data: ``(x, y)`` tensors (or a dict of tensors for x), a sequential ``DataLoader``, or a data module.
        suite: ``"quick"``, ``"basic"``, the path of a YAML file, or a resolved suite.
        budgets: Budgets per norm; by default those of the data module. For dictionary inputs per ``<modality>_<norm>``, and
            ``joint`` for several modalities at once, see :class:`~sg_lightning.threats.JointBudget`.
        domain: Legal values, one for each modality of dictionary inputs; by default those of the data module, else [0, 1].
        max_samples: Only the first so many samples.
        batch_size: Samples attacked together (loaders keep their own). Does not change the result.
        out: Folder for rows as they are made, and for the whole result at the end (``RobustnessResult.load(out)``);
            an interrupted run goes on from there.
        seed: Seed of random starts and controls.
        estimator: Gradient estimator of the attacks for spiking neurons; ``None``: the training surrogate.
        eot: Gradients averaged per step, for stochastic models.
        votes: Forward passes whose majority decides, for stochastic models.
        substitutes: Other models by name, e.g. ``{"ann": twin, "seed2": net}``: the strongest gradient attack of each
            norm and budget is crafted on each of them too and judged by the model (``transfer-ann/pgd-40x2``).
        check_samples_count: Samples on which all attacks run, for the honesty checks; 0 switches them off.
        keep: ``"all"`` writes the adversarial input of every sample, one file ``adversarial/<norm>.pt`` per norm in
            ``out`` (:class:`~sg_lightning.evaluation.adversarial.AdversarialStore` says what is in it); ``"few"`` keeps
            some per norm, for pictures.
        cuda_graphs: Capture the iterations of attacks in CUDA graphs, where they allow it: for small networks on a GPU,
            which waits for Python otherwise. What cannot be captured runs as it is.
        progress: Show a progress bar on stderr.

    Returns:
        The result; also in ``out`` if that is given.

    Raises:
        ValueError: on bad data, labels, budgets, an unknown suite, an ``out`` that holds another run, or
            ``keep="all"`` without ``out``, ``cuda_graphs`` for a model that is not on a GPU.
        TypeError: if the model does not return one tensor of logits.
    """
    if batch_size < 1 or check_samples_count < 0:
        raise ValueError(
            f"batch_size must be >= 1 and check_samples_count >= 0, got {batch_size}, {check_samples_count}"
        )
    source = Source(data, max_samples)
    domain = legal_domain(domain, source)
    source.check(domain)
    budgets = budgets or source.budgets or {}
    resolved, left_out = load_suite(suite, budgets, domain).applicable(model)
    substitutes = substitutes or {}
    resolved = with_substitutes(resolved, substitutes)
    device = next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else None
    record = recorder(cuda_graphs, device)
    oracle = Oracle(model, estimator=estimator, eot=eot, votes=votes, record=record)
    batches = source.batches(batch_size)
    first = next(batches)
    check_samples(first[0], first[1], domain)
    _ask_one(oracle, first[0], device)
    for name, other in substitutes.items():
        asked = Oracle(other)
        _ask_one(asked, first[0], device)
        if asked.classes != oracle.classes:
            raise ValueError(f"the substitute {name!r} has {asked.classes} classes, the model {oracle.classes}")
    session = Session(
        oracle, resolved, samples=len(source), seed=seed, check_samples_count=check_samples_count, out=out, keep=keep,
        bar=TqdmBar() if progress and process()[0] == 0 else None,
    )  # fmt: skip
    with closing(session):
        for x, y, ids in chain([first], batches):
            check_samples(x, y, domain)
            session.check(x, y, ids)
            mine = session.share(ids)
            if len(mine) == 0:
                continue
            x, y = select(x, mine), y[mine]
            if device is not None:
                x, y = to_device(x, device), y.to(device)
            session.batch(x, y, ids[mine])
    reasons = {norm: budgets[norm].reason for norm in resolved.norms if norm in budgets and budgets[norm].reason}
    notes = {"data": data_name(data), "headline budgets": reasons, "left out": left_out}
    result = session.finish(domain=domains_text(domain), **{name: note for name, note in notes.items() if note})
    assert result is not None  # an empty test set was refused above
    return result


def _ask_one(oracle: Oracle, x: Input, device: torch.device | None) -> None:
    """Ask for the logits of one sample: a model that cannot be attacked is refused before any work."""
    one = select(x, torch.arange(1))
    oracle.logits(one if device is None else to_device(one, device))
