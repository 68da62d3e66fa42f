"""How much the level of ASSG and HART matters: APGD and SA-PGD with 100 steps at a range of each.

    python benchmarks/estimator_levels.py [--data-dir FOLDER_WITH_FASHION_MNIST]

You will see: for each adversarially trained spiking network of estimators.py the samples that stand at each level, on
validation images and on test images, so that it shows whether a level chosen on the former holds for the latter. Results
go to benchmarks/results (estimator-levels.json, estimator-levels.md, estimator-levels.png).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from attack_models import SUBJECTS
from estimators import OPTIMISERS, RESULTS, Bench
from timing import measured, provenance, save

from sg_lightning.attacks import ASSG, HART, Estimator

LEVELS: dict[str, list[Estimator]] = {
    "ASSG, a": [ASSG(a) for a in (0.25, 0.3, 0.35, 0.39, 0.425, 0.46)],
    "HART, gamma": [HART(gamma) for gamma in (0.1, 0.2, 0.3, 0.5, 1.0)],
}
NAMES = ("APGD", "SA-PGD")


def level(estimator: Estimator) -> float:
    """Return the number that a title of ``LEVELS`` ends with."""
    return getattr(estimator, "a", None) or getattr(estimator, "gamma", 0.0)


def measure(subject: str, steps: int, data_dir: str) -> dict[str, Any]:
    """Count who stands at every level, on validation images and on test images."""
    found = []
    for part in ("validation", "test"):
        bench = Bench(subject, steps, data_dir, part)
        for title, estimators in LEVELS.items():
            for estimator in estimators:
                for name in NAMES:
                    attack = OPTIMISERS[name](bench.threat, steps=steps, estimator=estimator)  # type: ignore[call-arg]
                    stands = int(bench.survivors(attack).sum())
                    found.append({
                        "part": part, "title": title, "level": level(estimator), "optimiser": name, "survivors": stands,
                        "samples": len(bench.y),
                    })  # fmt: skip
                    print(f"  {subject}, {part}: {name}, {title} = {level(estimator)}: {stands}", file=sys.stderr)
    return {"subject": subject, "steps": steps, "eps": str(bench.threat.eps), "rows": found}


def table(results: dict[str, Any]) -> str:
    """Write the results as Markdown."""
    head = f"{measured(results['provenance'])}; seed 0. Cells: samples that stand on validation / on test images."
    lines = [head]
    for found in results["subjects"]:
        lines += ["", f"**{SUBJECTS[found['subject']].title}** (L-infinity {float(found['eps']):.4g})"]
        for title, estimators in LEVELS.items():
            levels = [level(estimator) for estimator in estimators]
            lines += ["", f"| {title} | {' | '.join(map(str, levels))} |", f"|---|{'---|' * len(levels)}"]
            for name in NAMES:
                rows = [row for row in found["rows"] if row["title"] == title and row["optimiser"] == name]
                cells = [" / ".join(f"{row['survivors']}" for row in rows if row["level"] == one) for one in levels]
                lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw robust accuracy over the level: a row per subject, a column per estimator."""
    from matplotlib.figure import Figure

    from sg_lightning.reporting.style import looks

    subjects, look = results["subjects"], looks(NAMES)
    figure = Figure(figsize=(4.2 * len(LEVELS), 2.9 * len(subjects)), layout="constrained")
    panels = figure.subplots(len(subjects), len(LEVELS), squeeze=False)
    for line, found in zip(panels, subjects, strict=True):
        for axes, title in zip(line, LEVELS, strict=True):
            for name in NAMES:
                for part, dashes in (("validation", ":"), ("test", "-")):
                    rows = [
                        r for r in found["rows"] if (r["title"], r["optimiser"], r["part"]) == (title, name, part)
                    ]  # fmt: skip
                    axes.plot(
                        [r["level"] for r in rows], [r["survivors"] / r["samples"] for r in rows], color=look[name].colour,
                        marker=look[name].marker, linestyle=dashes, markersize=5, label=f"{name}, {part}",
                    )  # fmt: skip
            axes.set_title(found["subject"], fontsize=9)
            axes.set_xlabel(title, fontsize=8)
            axes.grid(alpha=0.3)
            axes.tick_params(labelsize=8)
    figure.supylabel("robust accuracy: lower is the stronger attack", fontsize=9)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", default=["digits", "fashion"], choices=SUBJECTS)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--data-dir", default="data", help="folder of downloaded data sets")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    made = provenance(["torch", "numpy", "sg-lightning"])
    results = {"provenance": made, "subjects": [measure(name, args.steps, args.data_dir) for name in args.subjects]}
    save(results, table(results), args.out, "estimator-levels")
    draw(results, args.out / "estimator-levels.png")
    print(table(results))


if __name__ == "__main__":
    main()
