"""Where the time of a training step and of a PGD step goes.

    python benchmarks/where_time_goes.py

You will see, for the networks of benchmarks/training.py, the share of CPU time that convolutions and matrix products,
batch norm, neurons, pooling, the optimiser and all else take in one step: of ours (eager and compiled), of the same network in
snnTorch stepped over time, and of the ReLU floor. Results go to benchmarks/results (where_time_goes.json, where_time_goes.md).
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from networks import NETWORKS
from timing import measured, provenance, save
from torch.profiler import ProfilerActivity, profile, record_function
from training import COMPILED, FLOOR, OURS, STEP, attack_step, batch, contestants, training_step

from sg_lightning.backbones import pooling
from sg_lightning.neurons import operators

ROOT = Path(__file__).parent.parent
NEURONS, POOLING = "neurons", "pooling"
WARMUP, RUNS = 6, 3
GROUPS = {
    "convolutions and matrix products": ("conv", "mkldnn", "mm", "linear"),
    "batch norm": ("batch_norm",),
    POOLING: ("pool",),
    "optimiser": ("_foreach", "Optimizer", "optimizer"),
}


def grouped(run: Callable[[int], None]) -> dict[str, float]:
    """Return milliseconds of each group in one run: the mean of three, after some in which the heap grows."""
    for _ in range(WARMUP):
        run(0)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(RUNS):
            run(0)
    total: Counter[str] = Counter()
    inside = [e for e in found.events() if e.name in (NEURONS, POOLING)]
    for event in found.events():
        spent = event.self_cpu_time_total / 1000 / RUNS
        around = (
            n.name for n in inside
            if n.thread == event.thread and n.time_range.start <= event.time_range.start <= n.time_range.end
        )  # fmt: skip
        group = next((g for g, names in GROUPS.items() if any(n in event.name for n in names)), "all else")
        total[next(around, group)] += spent
    return dict(total)


def marked() -> None:
    """Let the profile see our neurons and poolings, which are several operators each."""
    parts: list[tuple[Any, str, str]] = [(operators, name, NEURONS) for name in ("_forward", "_backward")]
    parts += [(function, "forward", POOLING) for function in (pooling._Means, pooling._Spread)]
    for owner, name, group in parts:
        run = _recorded(getattr(owner, name), group)
        setattr(owner, name, staticmethod(run) if isinstance(owner, type) else run)


def _recorded(plain: Callable[..., Any], group: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with record_function(group):
            return plain(*args)

    return run


def measure(name: str) -> dict[str, Any]:
    """Profile the contestants on one network."""
    network = NETWORKS[name]
    nets, (x, y) = contestants(network), batch(network)
    return {
        f"{kind} | {who}": grouped(
            training_step(nets[who], x, y, None)
            if kind == "train"
            else attack_step(nets[who], x, y, None, backward=who == STEP)
        )
        for kind in ("train", "pgd")
        for who in (STEP, OURS, COMPILED, FLOOR)
    }


def table(results: dict[str, Any]) -> str:
    """Write the results as Markdown."""
    groups = [*GROUPS, NEURONS, "all else"]
    head = (
        f"{measured(results['provenance'])}. Milliseconds of one training step, and of three PGD steps, by torch's profiler. "
        "snnTorch's neurons are ordinary operations and count as all else, as do those of recurrent layers. What the profiler "
        "itself allocates breaks up the heap, so that large tensors fault their pages in anew: rows of the event network are up "
        "to twice what benchmarks/training.py measures."
    )
    lines = [
        head,
        "",
        f"| Network | Step | Contestant | {' | '.join(groups)} | sum |",
        "|---|---|---|" + "---|" * (len(groups) + 1),
    ]
    for name, rows in results["networks"].items():
        for key, row in rows.items():
            cells = " | ".join(f"{row.get(group, 0.0):.1f}" for group in groups)
            lines.append(f"| {name} | {key} | {cells} | {sum(row.values()):.1f} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["vgg", "shd", "shd-recurrent", "dvs"], choices=NETWORKS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    marked()
    results = {
        "provenance": provenance(["torch", "snntorch", "sg-lightning"]),
        "networks": {name: measure(name) for name in args.networks},
    }
    save(results, table(results), args.out, "where_time_goes")
    print(table(results))


if __name__ == "__main__":
    main()
