"""Which gradient estimator with which optimiser breaks most, and whether anything slips past the suite `standard`.

    python benchmarks/estimators.py [--data-dir FOLDER_WITH_FASHION_MNIST]

You will see: for each adversarially trained spiking network the robust accuracy under PGD, APGD and SA-PGD with 100 steps
(L-infinity), each with eight gradient estimators, and of the per-sample worst of the 19 surrogates of arXiv 2311.09266
with PGD-100 beside that of `standard`. The settings of HART and ASSG are chosen on validation images. Results go to
benchmarks/results (estimators.json, estimators.md, estimators.png); those of subjects not named stay.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from attack_models import SUBJECTS, prepare, validation
from timing import measured, provenance, save
from torch import Tensor

from sg_lightning.attacks import (
    APGD,
    ASSG,
    BPTR,
    HART,
    PDSG,
    PGD,
    RGA,
    SAPGD,
    Act,
    Attack,
    Estimator,
    Mix,
    Oracle,
    load_suite,
    tune,
    verify,
)
from sg_lightning.attacks.estimators import ENSEMBLES
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import Budget, Linf

RESULTS = Path(__file__).parent / "results"
OPTIMISERS: dict[str, type[Attack]] = {"PGD": PGD, "APGD": APGD, "SA-PGD": SAPGD}
EOT = {"digits-poisson": 4}
VOTES = {"digits-poisson": 5}


class Bench:
    """One subject: its model behind an oracle, its test (or validation) images, and who is right without an attack."""

    def __init__(self, subject: str, steps: int, data_dir: str, part: str = "test") -> None:
        self.subject, self.steps, self.data_dir = subject, steps, data_dir
        self.model, self.x, self.y = prepare(subject, data_dir)
        if part == "validation":
            self.x, self.y = validation(subject, len(self.y), data_dir)
        self.threat = Linf(SUBJECTS[subject].eps["linf"])
        self.clean = self.oracle().correct(self.x, self.y)

    def oracle(self) -> Oracle:
        """Return a fresh oracle."""
        return Oracle(self.model, eot=EOT.get(self.subject, 1), votes=VOTES.get(self.subject, 1))

    def survivors(self, attack: Attack, standing: Tensor | None = None) -> Tensor:
        """Return who is right and stands, bool (B,); only those in ``standing`` are attacked."""
        index = (self.clean if standing is None else standing).nonzero().squeeze(1)
        stands = torch.zeros_like(self.clean)
        if len(index):
            x, y = self.x[index], self.y[index]
            noise = SampleGenerator.from_ids(0, index.tolist())
            oracle = self.oracle()
            found = attack.run(oracle, x, y, generator=noise)
            stands[index] = ~(verify(oracle, self.threat, x, found.x_adv, y).counts | found.invalid)
        return stands

    def tuned(self, estimator: Estimator, setting: str, low: float, high: float) -> float:
        """Choose a setting on validation images, with SA-PGD."""
        x, y = validation(self.subject, 64, self.data_dir)
        attack = SAPGD(self.threat, steps=max(self.steps // 2, 1), estimator=estimator)
        noise = SampleGenerator.from_ids(0, list(range(len(y))))
        chosen = tune(attack, self.oracle(), x, y, setting=setting, low=low, high=high, rounds=4, generator=noise)
        return round(getattr(chosen.estimator, setting), 3)

    def estimators(self) -> dict[str, Estimator | None]:
        """Return what is compared, by title."""
        gamma, a = self.tuned(HART(), "gamma", 0.1, 1.0), self.tuned(ASSG(), "a", 0.25, 0.49)
        return {
            "training surrogate": None, "straight-through": Act(), "BPTR": BPTR(), "RGA": RGA(),
            f"HART, gamma = {gamma}": HART(gamma), "MIX": Mix(), "PDSG": PDSG(), "ASSG, a = 0.425": ASSG(),
            f"ASSG, a = {a}": ASSG(a),
        }  # fmt: skip


def measure(subject: str, steps: int, data_dir: str) -> dict[str, Any]:
    """Run every estimator with every optimiser on a subject, then the ensemble and the suite."""
    bench = Bench(subject, steps, data_dir)
    rows = []
    for title, estimator in bench.estimators().items():
        for name, optimiser in OPTIMISERS.items():
            started = time.process_time()
            stands = bench.survivors(optimiser(bench.threat, steps=steps, estimator=estimator))  # type: ignore[call-arg]
            rows.append({
                "estimator": title, "optimiser": name, "survivors": stands.nonzero().squeeze(1).tolist(),
                "seconds": round(time.process_time() - started, 1),
            })  # fmt: skip
            print(f"  {subject}: {name}-{steps}, {title}: {int(stands.sum())}", file=sys.stderr)
    ensemble = suite = bench.clean
    for estimator in ENSEMBLES["surrogates-19"]:
        ensemble = bench.survivors(PGD(bench.threat, steps=steps, estimator=estimator), ensemble)
    eps = bench.threat.eps
    for attack in load_suite("standard", {"linf": Budget((eps,), eps)}).entries[0].attacks:
        suite = bench.survivors(attack, suite)
    both = {"surrogates-19": ensemble, "standard": suite}
    return {
        "subject": subject, "title": SUBJECTS[subject].title, "samples": len(bench.y), "eps": str(eps), "steps": steps,
        "eot": EOT.get(subject, 1), "votes": VOTES.get(subject, 1), "clean": int(bench.clean.sum()), "rows": rows,
        "union": len(set.intersection(*(set(row["survivors"]) for row in rows))),
        **{name: int(stands.sum()) for name, stands in both.items()},
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """Write the results as Markdown."""
    head = (
        "Seed 0. Cells: test samples that stand (robust accuracy); bold: the least, and "
        "within one sample of it. The settings of HART and of the last row were chosen on 64 validation images."
    )
    lines = [head]
    for found in results["subjects"]:
        n, best = found["samples"], min(len(row["survivors"]) for row in found["rows"])
        chance = f", gradients of {found['eot']} draws, majority of {found['votes']} votes" if found["eot"] > 1 else ""
        titles = dict.fromkeys(row["estimator"] for row in found["rows"])
        title = (
            f"**{found['title']}** ({n} test samples, {found['clean']} right without attack, L-infinity "
            f"{float(found['eps']):.4g}, {found['steps']} steps{chance})"
        )
        lines += [
            "",
            title,
            "",
            f"{measured(found['provenance'])}.",
            "",
            f"| Estimator | {' | '.join(OPTIMISERS)} |",
            f"|---|{'---|' * len(OPTIMISERS)}",
        ]
        for title in titles:
            counts = [len(row["survivors"]) for row in found["rows"] if row["estimator"] == title]
            cells = [f"**{c}** ({c / n:.3f})" if c <= best + 1 else f"{c} ({c / n:.3f})" for c in counts]
            lines.append(f"| {title} | {' | '.join(cells)} |")
        together = (
            f"All of the table together: {found['union']}. The 19 surrogates with PGD-{found['steps']}: "
            f"{found['surrogates-19']}. Suite `standard`: {found['standard']}."
        )
        lines += ["", together]
    return "\n".join(lines) + "\n"


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw one panel per subject: an estimator per line, an optimiser per marker."""
    from matplotlib.figure import Figure

    from sg_lightning.reporting.style import looks

    subjects = results["subjects"]
    figure = Figure(figsize=(4.6 * len(subjects), 4.2), layout="constrained")
    look = looks(OPTIMISERS)
    for number, found in enumerate(subjects, start=1):
        axes = figure.add_subplot(1, len(subjects), number)
        titles = list(dict.fromkeys(row["estimator"] for row in found["rows"]))
        for name in OPTIMISERS:
            shares = [len(row["survivors"]) / found["samples"] for row in found["rows"] if row["optimiser"] == name]
            axes.plot(
                shares, range(len(titles)), look[name].marker, color=look[name].colour, label=name, markersize=7,
                alpha=0.8,
            )  # fmt: skip
        for name, dashes in (("surrogates-19", ":"), ("standard", "-")):
            axes.axvline(found[name] / found["samples"], color="0.4", linestyle=dashes, linewidth=1.2, label=name)
        axes.set_yticks(range(len(titles)), titles, fontsize=8)
        axes.invert_yaxis()
        axes.set_title(f"{found['subject']}: clean {found['clean'] / found['samples']:.3f}", fontsize=9)
        axes.grid(alpha=0.3)
        axes.tick_params(axis="x", labelsize=8)
    figure.supxlabel("robust accuracy: lower is the stronger attack", fontsize=9)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", default=["digits", "fashion", "digits-poisson"], choices=SUBJECTS)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--data-dir", default="data", help="folder of downloaded data sets")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    before = args.out / "estimators.json"
    found = json.loads(before.read_text(encoding="utf-8"))["subjects"] if before.is_file() else []
    for subject in args.subjects:
        print(f"{subject}: training, unless it is in the cache", file=sys.stderr)
        made = provenance(["torch", "numpy", "sg-lightning"])
        new = {**measure(subject, args.steps, args.data_dir), "provenance": made}
        found = [new if old["subject"] == subject else old for old in found]
        found += [] if new in found else [new]
        results = {"subjects": found}
        save(results, table(results), args.out, "estimators")
    draw(results, args.out / "estimators.png")
    print(table(results))


if __name__ == "__main__":
    main()
