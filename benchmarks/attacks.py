"""Compare our attacks with those of other libraries: same model, same samples, same budget, one process, one thread.

    make benchmark-attacks         (installs the libraries, then runs: python benchmarks/attacks.py)

You will see: robust accuracy, samples through the model, CPU time and the ratio to ours, for PGD and APGD on two spiking
networks. Every adversarial example is projected and verified by our own code before it counts. Results go to
benchmarks/results (attacks.json, attacks.md, attacks.png), and the table into docs/attacks.md.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from attack_contestants import OURS, PACKAGES, SLOW, Counting, Event, contestants
from attack_models import SUBJECTS, prepare
from timing import into_docs, measured, provenance, race, ratios, save
from torch import Tensor, nn

from sg_lightning.attacks import Oracle, verify
from sg_lightning.threats import SingleThreat
from sg_lightning.threats.budget import make_threat

ROOT = Path(__file__).parent.parent
NORMS = ("linf", "l2", "l1")
APGD100 = tuple(Event("apgd", norm, "ce", 100) for norm in NORMS)
PROGRAMME = {
    "convnet": (*APGD100, Event("pgd", "linf", "ce", 10), Event("pgd", "l1", "ce", 10)),
    "vgg5": APGD100,
    "tiny": (Event("pgd", "linf", "ce", 3), Event("apgd", "l2", "dlr", 5), Event("pgd", "l1", "ce", 3)),
}


def measure(subject: str, event: Event, rounds: int) -> list[dict[str, Any]]:
    """Run one event for everybody and return one record per contestant."""
    model, x, y = prepare(subject)
    threat = make_threat(event.norm, SUBJECTS[subject].eps[event.norm])
    counting = Counting(model)
    found: dict[str, list[dict[str, float]]] = {}

    def prepared(run: Any) -> Any:
        def once(number: int) -> Tensor:
            counting.forwards = counting.backwards = 0
            for parameter in model.parameters():
                parameter.grad = None
            return run(counting, x.clone(), y, number)

        return once

    def look(name: str, x_adv: Tensor) -> None:
        found.setdefault(name, []).append(
            {**judge(model, threat, x, x_adv, y), "forwards": counting.forwards / len(y),
             "backwards": counting.backwards / len(y)}
        )  # fmt: skip

    for run in contestants(replace(event, steps=min(event.steps, 5)), threat).values():  # imports, caches, allocator
        prepared(run)(0)
    runs = {name: prepared(run) for name, run in contestants(event, threat).items()}
    seconds = race(runs, rounds, look, once=SLOW)
    reference = seconds.get(OURS)
    records = []
    for name, spent in seconds.items():
        seen = found[name]
        records.append(
            {
                "subject": subject, "event": event.title, "norm": event.norm, "eps": str(threat.eps), "contestant": name,
                "samples": len(y), "seconds": spent,
                "ratio": ratios(spent, reference[: len(spent)]) if reference else None,
                **{key: [one[key] for one in seen] for key in ("robust", "outside", "forwards", "backwards")},
                "leaves_weight_gradients": any(one["weight_gradients"] for one in seen),
            }
        )  # fmt: skip
        print("  " + " | ".join(cells(records[-1])), file=sys.stderr)
    return records


def judge(model: nn.Module, threat: SingleThreat, x: Tensor, x_adv: Tensor, y: Tensor) -> dict[str, float]:
    """Verify a result: what is not finite or outside the budget is projected, or replaced, before it counts.

    Returns:
        ``robust``: share of samples that stand. ``outside``: share that came back outside budget or domain by more than
        1e-5. ``weight_gradients``: whether the attack left gradients in the weights.
    """
    left = any(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        x_adv = x_adv.detach()
        tolerant = type(threat)(threat.budget * (1 + 1e-5))
        outside = ~tolerant.contains(x_adv.clamp(0, 1), x) | ((x_adv - x_adv.clamp(0, 1)).abs() > 1e-5).flatten(1).any(
            1
        )
        finite = torch.isfinite(x_adv).flatten(1).all(1).view(-1, 1, 1, 1)
        verdict = verify(Oracle(model), threat, x, threat.project(torch.where(finite, x_adv, x), x), y)
        if not bool(verdict.inside.all()):
            raise AssertionError("a projected point is outside its threat")
    return {
        "robust": 1 - float(verdict.misclassified.float().mean()), "outside": float(outside.float().mean()),
        "weight_gradients": left,
    }  # fmt: skip


def cells(record: dict[str, Any]) -> list[str]:
    """Write a record as the cells of its row: medians, and the range where it is worth knowing."""
    ratio = record["ratio"]
    notes = [f"{max(record['outside']):.0%} outside the budget"] * (max(record["outside"]) > 0)
    notes += ["leaves weight gradients"] * record["leaves_weight_gradients"]
    return [
        record["event"],
        record["contestant"],
        f"{median(record['robust']):.3f}" + _range(record["robust"], ".3f"),
        f"{median(record['forwards']):.1f}",
        f"{median(record['backwards']):.1f}",
        f"{median(record['seconds']):.2f}",
        "" if ratio is None else f"{median(ratio):.2f}" + _range(ratio, ".2f"),
        ", ".join(notes),
    ]


def _range(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return "" if low == high else f" ({low}-{high})"


def table(results: dict[str, Any]) -> str:
    """Write the results as Markdown."""
    head = (
        f"{measured(results['provenance'])}. Medians of {results['rounds']} rounds with the seeds 0, 1, ... (range in brackets where it is not a point; "
        "of ART and of ours without early drop one round); "
        "forwards and backwards are passes per sample; time is CPU time; ratio is time relative to ours, round by round."
    )
    lines = [head]
    for subject in dict.fromkeys(record["subject"] for record in results["records"]):
        records = [record for record in results["records"] if record["subject"] == subject]
        eps = dict.fromkeys(f"{record['norm']} {record['eps']}" for record in records)
        title = (
            f"**{SUBJECTS[subject].title}** ({records[0]['samples']} test samples, clean accuracy "
            f"{results['clean'][subject]:.3f}, eps: {', '.join(eps)})"
        )
        lines += [
            "",
            title,
            "",
            "| Attack | Library | Robust accuracy | Forwards | Backwards | Seconds | Ratio | Notes |",
            "|---|---|---|---|---|---|---|---|",
            *(f"| {' | '.join(cells(record))} |" for record in records),
        ]
    return "\n".join(lines) + "\n"


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the time relative to ours with its range as bars, labelled with robust accuracy; one panel per event."""
    from matplotlib.figure import Figure

    from sg_lightning.reporting.style import looks

    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in results["records"]:
        if record["ratio"]:
            panels.setdefault((record["subject"], record["event"]), []).append(record)
    look = looks(dict.fromkeys(_library(record) for record in results["records"]))
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 2.6 * rows + 0.6), layout="constrained")
    for number, ((subject, event), records) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        for place, record in enumerate(records):
            middle, low, high = median(record["ratio"]), min(record["ratio"]), max(record["ratio"])
            colour = look[_library(record)].colour
            plain = "no early drop" in record["contestant"]
            axes.barh(
                place, middle, xerr=[[middle - low], [high - middle]], height=0.65, edgecolor=colour,
                color="none" if plain else colour, error_kw={"linewidth": 1, "capsize": 2},
            )  # fmt: skip
            axes.text(high, place, f"  {median(record['robust']):.3f}", va="center", fontsize=8)
        axes.set_yticks(range(len(records)), [record["contestant"] for record in records], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25 * max(max(record["ratio"]) for record in records))
        axes.axvline(1, color="black", linewidth=0.7, linestyle=":")
        axes.set_title(f"{subject}: {event}", fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Robust accuracy (numbers at the bars): lower is the stronger attack", fontsize=10)
    figure.supxlabel("CPU time relative to ours: median and range of rounds", fontsize=9)
    figure.savefig(path, dpi=110)


def _library(record: dict[str, Any]) -> str:
    return record["contestant"].split(" ")[0].rstrip(",")


def write(results: dict[str, Any], folder: Path) -> None:
    """Write results, table and plot; after every event, so that an interrupted run leaves what it has measured."""
    save(results, table(results), folder, "attacks")
    draw(results, folder / "attacks.png")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", default=["vgg5", "convnet"], choices=PROGRAMME)
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds, after a short one that warms up")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", default="", help="events whose title holds this text, e.g. PGD-10")
    parser.add_argument("--docs", type=Path, help="document that gets the table, e.g. docs/attacks.md")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="advertorch|torchattacks|foolbox|pyautoattack|art")

    made, clean, records = provenance(["torch", "numpy", "sg-lightning", *PACKAGES]), {}, []
    for subject in args.subjects:
        print(f"{subject}: training, unless it is in the cache", file=sys.stderr)
        model, x, y = prepare(subject)
        clean[subject] = float(Oracle(model).correct(x, y).float().mean())
        for event in PROGRAMME[subject]:
            if args.only in event.title:
                records += measure(subject, event, args.rounds)
                write({"provenance": made, "rounds": args.rounds, "clean": clean, "records": records}, args.out)
    text = (args.out / "attacks.md").read_text(encoding="utf-8")
    if args.docs:
        into_docs(text, args.docs, "attacks.md")
    print(text)


if __name__ == "__main__":
    main()
