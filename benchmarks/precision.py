"""What bfloat16 costs: accuracy, changed predictions and flipped spikes of networks trained and used in two precisions.

    python benchmarks/precision.py

You will see, for images (Digits, ConvNet) and sound (SpokenDigits, a stand-in; SpikingMLP), networks trained with
`Trainer(precision="32-true")` and `Trainer(precision="bf16-mixed")` from the same weights on the same batches, each tested in
both precisions. Under autocast convolutions and linear layers compute in bfloat16; membranes stay float32, and spikes are
exact in either. TF32 is a mode of CUDA devices: on a CPU there is nothing to measure. About two minutes; results go to
benchmarks/results (precision.json, precision.md).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from modalities import TASKS, Task
from timing import measured, provenance, save
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from sg_lightning import SpikingClassifier
from sg_lightning.neurons import SpikingNeuron

ROOT = Path(__file__).parent.parent
PRECISIONS = ("32-true", "bf16-mixed")


def train(task: Task, precision: str, seed: int, epochs: int) -> tuple[nn.Module, LightningDataModule, float]:
    """Train a network; the seed fixes weights and batches."""
    seed_everything(seed, verbose=False)
    data = task.data()
    module = SpikingClassifier(
        task.network(),
        optimizer=lambda parameters: AdamW(parameters, lr=task.lr),
        lr_scheduler=lambda optimizer: CosineAnnealingLR(optimizer, epochs),
    )
    trainer = Trainer(
        max_epochs=epochs, precision=precision, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    started = time.process_time()
    trainer.fit(module, data)
    return module.backbone.eval(), data, time.process_time() - started


def run(net: nn.Module, x: Tensor, *, cast: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Return predictions and the spikes behind each neuron."""
    spikes: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, out, name=name: spikes.update({name: out > 0}))
        for name, layer in net.named_modules()
        if isinstance(layer, SpikingNeuron)
    ]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=cast):
        predictions = net(x).argmax(1)
    for hook in hooks:
        hook.remove()
    return predictions, spikes


def compare(net: nn.Module, data: LightningDataModule) -> dict[str, Any]:
    """Test a network in both precisions."""
    right = dict.fromkeys(PRECISIONS, 0)
    samples = changed = 0
    flipped: dict[str, int] = {}
    fired: dict[str, int] = {}
    cells: dict[str, int] = {}
    for x, y in data.test_dataloader():
        exact, spikes = run(net, x, cast=False)
        rounded, others = run(net, x, cast=True)
        samples += len(y)
        changed += int((exact != rounded).sum())
        for precision, found in zip(PRECISIONS, (exact, rounded), strict=True):
            right[precision] += int((found == y).sum())
        for name, s in spikes.items():
            flipped[name] = flipped.get(name, 0) + int((s != others[name]).sum())
            fired[name] = fired.get(name, 0) + int(s.sum())
            cells[name] = cells.get(name, 0) + s.numel()
    return {
        "samples": samples,
        "accuracy": {precision: count / samples for precision, count in right.items()},
        "changed": changed / samples,
        "flipped": {name: flipped[name] / cells[name] for name in flipped},
        "fired": {name: fired[name] / cells[name] for name in fired},
    }


def measure(name: str, seeds: int, epochs: int | None) -> list[dict[str, Any]]:
    """Train and test with every precision and seed."""
    task, records = TASKS[name], []
    for seed in range(seeds):
        for precision in PRECISIONS:
            net, data, seconds = train(task, precision, seed, epochs or task.epochs)
            found = compare(net, data)
            records.append({
                "task": name, "title": task.title, "trained": precision, "seed": seed, "seconds": seconds, **found,
            })  # fmt: skip
            print(name, precision, seed, found["accuracy"], f"{seconds:.0f} s", file=sys.stderr)
    return records


def table(results: dict[str, Any]) -> str:
    """Write the results as Markdown."""
    head = (
        f"{measured(results['provenance'])}. Means over {results['seeds']} seeds, lowest and highest in brackets. Changed: share of "
        "test samples whose prediction differs between the two precisions. Flipped: share of neurons and steps whose spike "
        "differs, layer by layer from the input (in brackets the share that fires). CPU: bfloat16 by autocast; TF32 is a mode of "
        "CUDA devices and is not measured."
    )
    lines = [
        head, "", "| Task | Trained in | Accuracy in 32-true | Accuracy in bf16-mixed | Changed | Flipped | Training, s |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for title, precision in dict.fromkeys((r["title"], r["trained"]) for r in results["records"]):
        rows = [r for r in results["records"] if (r["title"], r["trained"]) == (title, precision)]
        tested = [_range([100 * r["accuracy"][p] for r in rows], "%") for p in PRECISIONS]
        flips = ", ".join(
            f"{100 * mean(r['flipped'][layer] for r in rows):.2f} % ({100 * mean(r['fired'][layer] for r in rows):.0f} %)"
            for layer in rows[0]["flipped"]
        )
        changed = _range([100 * r["changed"] for r in rows], "%")
        seconds = _range([r["seconds"] for r in rows], "")
        lines.append(f"| {title} | {precision} | {tested[0]} | {tested[1]} | {changed} | {flips} | {seconds} |")
    return "\n".join(lines) + "\n"


def _range(values: Sequence[float], unit: str) -> str:
    unit = unit and f" {unit}"
    return f"{mean(values):.1f}{unit} ({min(values):.1f}-{max(values):.1f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["digits", "spoken_digits"], choices=TASKS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="instead of each task's own")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = {
        "provenance": provenance(["torch", "lightning", "sg-lightning"]), "seeds": args.seeds,
        "records": [r for name in args.tasks for r in measure(name, args.seeds, args.epochs)],
    }  # fmt: skip
    save(results, table(results), args.out, "precision")
    print(table(results))


if __name__ == "__main__":
    main()
