"""Vanilla, SR, AT and AT+SR on images, events, sound and their fusion, each under its natural threats.

    python benchmarks/modalities.py

You will see: for every embedded data set and every method a training run and an evaluation under the suite `standard` at
the headline budgets, one table with the accuracy under each norm, the union, the random control and the warnings of the
honesty checks. Adversarial training attacks within the first budget of the set (all modalities at once for the fusion).
Events and sound are stand-ins made from digits and synthetic speech. Finished parts are kept in the folder of the results
and not run again: delete modalities-<set>.json to repeat one. Results: benchmarks/results/modalities.md and .png.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from timing import measured, provenance
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from sg_lightning import SparseGradient, SpikingClassifier, evaluate
from sg_lightning.attacks import PGD, Attack
from sg_lightning.backbones import Backbone, ConvNet, FusionNet, SpikingMLP
from sg_lightning.datamodules import Digits, MultimodalDigits, SaccadeDigits, SpokenDigits
from sg_lightning.domains import Binary, Counts
from sg_lightning.encoding import Frames
from sg_lightning.evaluation import RobustnessResult
from sg_lightning.modules import AdversarialClassifier
from sg_lightning.neurons import LIF, LeakyIntegrator, surrogates
from sg_lightning.threats import EventFlips, Joint, Linf

ROOT = Path(__file__).parent.parent
METHODS = {"vanilla": (False, False), "SR": (True, False), "AT": (False, True), "AT+SR": (True, True)}


@dataclass(frozen=True)
class Task:
    """A data set, its network and how it is trained.

    Args:
        title: In words.
        data: Makes the data module.
        network: Makes the network.
        attack: Makes the inputs of adversarial training.
        epochs: Passes over the training set.
        lr: Learning rate of AdamW at the start; cosine to 0.
        penalty: Weights of the sparse-gradient penalty, alone and with adversarial training. That of events, sound and
            fusion was the best of 0.0003, 0.003 (events: 0.02 too, sound: 0.00003) under PGD-10 on 48 validation samples.
        samples: Test samples that are attacked.
        norms: Which of the set's budgets; none: all.
    """

    title: str
    data: Callable[[], LightningDataModule]
    network: Callable[[], Backbone]
    attack: Callable[[], Attack]
    epochs: int
    lr: float
    penalty: tuple[float, float] = (0.02, 0.01)
    samples: int = 64
    norms: tuple[str, ...] = ()


def image_net() -> ConvNet:
    """Make the network for images."""
    return ConvNet()


def event_net() -> ConvNet:
    """Make the network for events."""
    return ConvNet(in_channels=2, input_size=16, encoding=Frames(6), neuron=LIF(0.9, 1.0, surrogate="triangular"))


def audio_net() -> SpikingMLP:
    """Make the network for sound."""
    neuron = LIF(0.9, 1.0, surrogate=surrogates.FastSigmoid(5.0))
    return SpikingMLP(70, (256,), 10, time_steps=50, neuron=neuron, readout=LeakyIntegrator(0.95, readout="mean"))


IMAGE, EVENTS, AUDIO = Linf("2/16"), EventFlips("5%", domain=Counts()), EventFlips("5%", domain=Binary())
TASKS = {
    "digits": Task("image: Digits, ConvNet 32-64", Digits, image_net, lambda: PGD(IMAGE, steps=5), 15, 5e-3),
    "saccade_digits": Task(
        "events: SaccadeDigits (stand-in), ConvNet 32-64", SaccadeDigits, event_net, lambda: PGD(EVENTS, steps=3), 12, 5e-3,
        penalty=(0.003, 0.001), samples=32,
    ),
    "spoken_digits": Task(
        "sound: SpokenDigits (stand-in), SpikingMLP 256", SpokenDigits, audio_net, lambda: PGD(AUDIO, steps=3), 20, 3e-3,
        penalty=(0.003, 0.001),
    ),
    "multimodal_digits": Task(
        "fusion: MultimodalDigits, gated FusionNet", MultimodalDigits,
        lambda: FusionNet({"image": image_net(), "events": event_net(), "audio": audio_net()}, fusion="gated"),
        lambda: PGD(Joint({"image": IMAGE, "events": EVENTS, "audio": AUDIO}), steps=3), 10, 3e-3, samples=16, penalty=(0.003, 0.001),
        norms=("image_linf", "events_retime_inf", "audio_flips", "joint"),
    ),
}  # fmt: skip


def train(
    task: Task, method: str, seed: int, epochs: int | None
) -> tuple[SpikingClassifier, LightningDataModule, float]:
    """Train one network; every method starts from the same weights and sees the same batches."""
    penalised, attacked = METHODS[method]
    seed_everything(seed, verbose=False)
    data, length = task.data(), epochs or task.epochs
    options: dict[str, Any] = {
        "optimizer": lambda parameters: AdamW(parameters, lr=task.lr),
        "lr_scheduler": lambda optimizer: CosineAnnealingLR(optimizer, length),
    }
    module: SpikingClassifier = (
        AdversarialClassifier(task.network(), attack=task.attack(), **options)
        if attacked
        else SpikingClassifier(task.network(), **options)
    )
    callbacks: list[Callback] = [SparseGradient(weight=task.penalty[attacked])] if penalised else []
    trainer = Trainer(
        max_epochs=length, callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    started = time.process_time()
    trainer.fit(module, data)
    return module, data, time.process_time() - started


def measure(name: str, out: Path, suite: str, seed: int, samples: int | None, epochs: int | None) -> dict[str, Any]:
    """Train and attack with every method, or read what was found before."""
    path = out / f"modalities-{name}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    task = TASKS[name]
    methods: dict[str, Any] = {}
    for method in METHODS:
        print(f"{name}: {method}", file=sys.stderr)
        module, data, seconds = train(task, method, seed, epochs)
        started = time.process_time()
        budgets = {norm: replace(budget, eps=(budget.headline,)) for norm, budget in data.budgets.items()}  # type: ignore[attr-defined]
        count = samples or task.samples
        result = evaluate(
            module,
            data,
            chosen(suite, task, out),
            budgets=budgets,
            seed=seed,
            max_samples=count,
            check_samples_count=min(32, count // 2),
        )
        print(result.table(), file=sys.stderr)
        methods[method] = {
            **figures(result), "training_seconds": seconds, "attack_seconds": time.process_time() - started,
            "penalty": task.penalty[METHODS[method][1]] if METHODS[method][0] else 0.0,
        }  # fmt: skip
    found = {
        "title": task.title, "suite": suite, "seed": seed, "epochs": epochs or task.epochs, "methods": methods,
        "provenance": provenance(["torch", "lightning", "sg-lightning"]),
    }  # fmt: skip
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def chosen(suite: str, task: Task, out: Path) -> str | Path:
    """Return the suite, cut down to the norms of the task if it names some: a file, as a user would write it."""
    if not task.norms:
        return suite
    content = yaml.safe_load(files("sg_lightning.attacks.suites").joinpath(f"{suite}.yaml").read_text(encoding="utf-8"))
    path = out / f"{suite}-of-{len(task.norms)}-norms.yaml"
    path.write_text(yaml.safe_dump({**content, "norms": list(task.norms)}, sort_keys=False), encoding="utf-8")
    return path


def figures(result: RobustnessResult) -> dict[str, Any]:
    """Return what the table needs of a result."""
    return {
        "n": len(result.ids),
        "clean": result.clean,
        "union": result.union(),
        "norms": {
            norm: {
                "eps": result.headline(norm), "accuracy": result.accuracy(norm), "interval": result.interval(norm),
                "random": result.random_accuracy(norm),
            }
            for norm in result.norms
        },
        "checks": [{"status": c.status, "name": c.name, "norm": c.norm, "detail": c.detail} for c in result.checks],
        "suite_hash": result.suite.hash,
    }  # fmt: skip


def table(found: Sequence[dict[str, Any]]) -> str:
    """Write all sets as Markdown."""
    lines = []
    for one in found:
        methods = one["methods"]
        norms = next(iter(methods.values()))["norms"]
        n = next(iter(methods.values()))["n"]
        heads = [f"{norm} {cell['eps']}" for norm, cell in norms.items()]
        head = (
            f"**{one['title']}**: suite `{one['suite']}` at the headline budgets, {n} test samples, {one['epochs']} epochs, "
            f"seed {one['seed']}. {measured(one['provenance'])}. Accuracy in %, of random changes of the same size in "
            "brackets."
        )
        lines += [
            head, "", "| Method | clean | " + " | ".join(heads) + " | union | training, CPU s | checks |",
            "|---|---|" + "---|" * len(heads) + "---|---|---|",
        ]  # fmt: skip
        for method, row in methods.items():
            cells = [
                f"{100 * c['accuracy']:.1f} ({'-' if c['random'] != c['random'] else format(100 * c['random'], '.1f')})"
                for c in row["norms"].values()
            ]
            bad = [c for c in row["checks"] if c["status"] != "pass"]
            noted = (
                "; ".join(f"{c['status']}: {c['name']}{' ' * bool(c['norm'])}{c['norm']}" for c in bad) or "all pass"
            )
            lines.append(
                f"| {method} | {100 * row['clean']:.1f} | {' | '.join(cells)} | {100 * row['union']:.1f} | "
                f"{row['training_seconds']:.0f} | {noted} |"
            )
        lines.append("")
    return "\n".join(lines)


def plot(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw clean and robust accuracy of every method, a panel per set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(len(found), 1, figsize=(9, 2.6 * len(found)), layout="constrained", squeeze=False)
    for axes, one in zip(all_axes[:, 0], found, strict=True):
        norms = list(next(iter(one["methods"].values()))["norms"])
        columns = ["clean", *norms, "union"]
        for place, (method, row) in enumerate(one["methods"].items()):
            heights = [row["clean"], *(row["norms"][norm]["accuracy"] for norm in norms), row["union"]]
            axes.bar(
                [i + 0.2 * (place - 1.5) for i in range(len(columns))], [100 * h for h in heights], 0.2,
                color=("#4a5361", "#0072b2", "#d55e00", "#009e73")[place], label=method,
            )  # fmt: skip
        axes.set_xticks(range(len(columns)), columns, fontsize=8)
        axes.set_ylim(0, 100)
        axes.set_ylabel("accuracy, %")
        axes.set_title(one["title"], loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0, 0].legend(ncols=4, fontsize=8, frameon=False, loc="upper right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--suite", default="standard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, help="test samples attacked, instead of those of the task")
    parser.add_argument("--epochs", type=int, help="instead of those of the task")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.tasks:
        measure(name, args.out, args.suite, args.seed, args.samples, args.epochs)
    done = [args.out / f"modalities-{name}.json" for name in TASKS]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in done if path.is_file()]
    (args.out / "modalities.md").write_text(table(found), encoding="utf-8")
    plot(found, args.out / "modalities.png")
    print(table(found))


if __name__ == "__main__":
    main()
