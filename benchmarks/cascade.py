"""What the cascade of a suite saves: each attack on what still stands, against each attack on all samples.

    python benchmarks/cascade.py --docs docs/attacks.md

You will see: CPU time and passes of the suite `standard` under every norm and budget of the digits, in turns, on the
adversarially trained digits network: every attack on all samples to its last step, as libraries do; every attack on
all samples, where those that fell are dropped within an attack; the cascade. Attacks and noise are the same, and so are the
survivors in float64; in float32, in which this runs, at most 1 % of them may differ, which is asserted. Results go to
benchmarks/results (cascade.json, cascade.md); those of another subject stay.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from attack_models import SUBJECTS, prepare
from timing import into_docs, measured, provenance, race, ratios, save
from torch import Tensor

from sg_lightning.attacks import Oracle, load_suite, verify
from sg_lightning.datamodules import Digits
from sg_lightning.sampling import SampleGenerator

ROOT = Path(__file__).parent.parent
FULL, DROPS, CASCADE = "every attack on all samples", "the same with early drop", "cascade"


def contestants(
    subject: str, suite: str, samples: int, norms: Sequence[str]
) -> dict[str, Callable[[int], tuple[Tensor, Oracle]]]:
    """Return the ways to run a suite; each takes a seed.

    Each returns who stands under each threat, bool (threats, B), and the oracle asked.
    """
    model, x, y = prepare(subject)
    x, y = x[:samples], y[:samples]
    resolved, _ = load_suite(suite, {norm: Digits.budgets[norm] for norm in norms}).applicable(model)

    def run(seed: int, way: str) -> tuple[Tensor, Oracle]:
        oracle = Oracle(model)
        clean = oracle.correct(x, y)
        history, norm, stands = [], "", clean
        for entry in resolved.entries:
            if entry.threat.norm != norm:  # what broke at a smaller budget is broken at a larger one of the same norm
                norm, stands = entry.threat.norm, clean.clone()
            for attack in entry.attacks:
                index = (stands if way == CASCADE else clean).nonzero().squeeze(1)
                if len(index):
                    noise = SampleGenerator.from_ids(seed, index.tolist())
                    found = attack.run(oracle, x[index], y[index], generator=noise, early_drop=way != FULL)
                    verdict = verify(oracle, entry.threat, x[index], found.x_adv, y[index])
                    stands[index] &= ~(verdict.counts | found.invalid)
            history.append(stands.clone())
        return torch.stack(history), oracle

    return {way: lambda seed, way=way: run(seed, way) for way in (FULL, DROPS, CASCADE)}  # type: ignore[misc]


def measure(subject: str, suite: str, samples: int, rounds: int, norms: Sequence[str]) -> dict[str, Any]:
    """Race the ways and return the figures of each."""
    found: dict[str, list[tuple[Tensor, Oracle]]] = {way: [] for way in (FULL, DROPS, CASCADE)}
    seconds = race(contestants(subject, suite, samples, norms), rounds, lambda name, result: found[name].append(result))
    differ = {
        name: sum(int((stands != full).sum()) for (stands, _), (full, _) in zip(found[name], found[FULL], strict=True))
        for name in found
    }
    decisions = sum(stands.numel() for stands, _ in found[FULL])
    if max(differ.values()) > 0.01 * decisions:  # in float32 rounding depends on who shares a batch
        raise AssertionError(f"who stands depends on how the suite is run: {differ} of {decisions} decisions differ")
    return {
        name: {
            "seconds": seconds[name],
            "differ": differ[name],
            "ratio": ratios(seconds[name], seconds[FULL]),
            "robust": [stands.float().mean(1).tolist() for stands, _ in found[name]],
            "forwards": [oracle.counts.forwards / samples for _, oracle in found[name]],
            "backwards": [oracle.counts.backwards / samples for _, oracle in found[name]],
        }
        for name in found
    }


def table(results: dict[str, Any]) -> str:
    """Write the results of all subjects as Markdown."""
    return "\n".join(_table(one) for one in results.values())


def _table(one: dict[str, Any]) -> str:
    head = (
        f"{measured(one['provenance'])}. Suite `{one['suite']}` under "
        f"{one['threats']}, {one['samples']} samples of: {one['title']}. Medians of {one['rounds']} rounds "
        "with the seeds 0, 1, ...; passes per sample; CPU time; decisions that differ from the first row's, in float32."
    )
    lines = [
        head,
        "",
        "| Way | Robust accuracy | Forwards | Backwards | Seconds | Ratio | Differ |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in one["ways"].items():
        forwards, backwards, seconds, ratio = (
            median(row[key]) for key in ("forwards", "backwards", "seconds", "ratio")
        )
        robust = ", ".join(f"{median(at):.3f}" for at in zip(*row["robust"], strict=True))
        spread = f" ({min(row['ratio']):.2f}-{max(row['ratio']):.2f})" if name != FULL else ""
        lines.append(
            f"| {name} | {robust} | {forwards:.0f} | {backwards:.0f} | {seconds:.1f} | {ratio:.2f}{spread} | "
            f"{row['differ']} of {len(row['robust'][0]) * one['samples'] * one['rounds']} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subject", default="digits", choices=SUBJECTS)
    parser.add_argument("--suite", default="standard")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--norms", nargs="+", default=list(Digits.budgets), choices=Digits.budgets)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, help="document that gets the table, e.g. docs/attacks.md")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    subject = SUBJECTS[args.subject]
    before = args.out / "cascade.json"
    results = json.loads(before.read_text(encoding="utf-8")) if before.is_file() else {}
    results[args.subject] = {
        "provenance": provenance(["torch", "numpy", "sg-lightning"]), "title": subject.title,
        "suite": args.suite, "threats": ", ".join(f"{norm} {eps}" for norm in args.norms for eps in Digits.budgets[norm].eps), "samples": args.samples, "rounds": args.rounds,
        "ways": measure(args.subject, args.suite, args.samples, args.rounds, args.norms),
    }  # fmt: skip
    save(results, table(results), args.out, "cascade")
    if args.docs:
        into_docs(table(results), args.docs, "cascade.md")
    print(table(results))


if __name__ == "__main__":
    main()
