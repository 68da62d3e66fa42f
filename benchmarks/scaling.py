"""How the cost of spiking layers and networks grows with T, B and the image.

    python benchmarks/scaling.py

You will see: CPU time of forward and backward of one LIF layer for T = 1 to 128 and B = 1 to 1024, of the dense network
of benchmarks/training.py for T B up to 512 samples and steps, and of the event network for images of 64 to 256 pixels;
the exponent of each growth, fitted on logarithms past the start-up cost (linear is 1), and the cost per element and step.
Neurons are compiled, where there is a compiler, and those of the layer also run in eager code. Each timed run repeats a
size until that takes 20 ms or more, so that small sizes do not pay for cold caches.
Results go to benchmarks/results (scaling.json, scaling.md, scaling.png).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from networks import NETWORKS, Folded, ours
from timing import measured, provenance, race, save
from torch.nn.functional import cross_entropy

from sg_lightning.neurons import LIF, paths, surrogates, use_path

ROOT = Path(__file__).parent.parent
NEURONS = 256  # of the layer, times B
LEAST = 0.02  # seconds of a timed run


def layer(steps: int, batch: int, path: paths.Path) -> tuple[Callable[[int], None], int]:
    """Return forward and backward of a layer on a path, and its elements times steps."""
    neuron = LIF(0.5, 1.0, "zero", detach_reset=True, surrogate=surrogates.Atan(2.0))
    x = (torch.rand(steps, batch, NEURONS) * 1.2).requires_grad_()
    upstream = torch.rand(steps, batch, NEURONS)

    def run(_: int) -> None:
        with use_path(path):
            torch.autograd.grad(neuron(x), x, upstream)

    return run, x.numel()


def network(
    name: str, steps: int, batch: int, path: paths.Path, size: int | None = None
) -> tuple[Callable[[int], None], int]:
    """Return forward and backward of a network on a path, and the values of its input."""
    chosen = NETWORKS[name]
    chosen = replace(chosen, steps=steps, batch=batch, shape=chosen.shape if size is None else (2, size, size))
    layers = chosen.weights()
    if size is not None:  # the linear layer behind the convolutions fits one size
        features = layers[-3].in_features * size * size // 128**2
        layers[-3] = torch.nn.Linear(features, layers[-3].out_features)
    net = Folded(layers, ours(chosen.beta)).train()
    x, y = chosen.inputs()

    def run(_: int) -> None:
        with use_path(path):
            cross_entropy(net(x), y).backward()

    return run, x.numel()


def cases(*, small: bool) -> dict[str, dict[int, tuple[Callable[[int], None], int]]]:
    """Return the runs of each growth by the value that grows."""
    path: paths.Path = "compiled" if not small and paths.has_compiler() else "eager"
    dense, steps, batch = ("tiny", 6, 4) if small else ("shd", 8, 16)
    times, batches = ([2**k for k in range(3 if small else top)] for top in (8, 11))
    found = {}
    for way in dict.fromkeys((path, "eager")):
        found[f"layer, {way}, T (B = 64)"] = {t: layer(t, 64, way) for t in times}
        found[f"layer, {way}, B (T = 8)"] = {b: layer(8, b, way) for b in batches}
    found[f"dense net, T (B = {batch})"] = {2**k: network(dense, 2**k, batch, path) for k in range(3 if small else 6)}
    found[f"dense net, B (T = {steps})"] = {2**k: network(dense, steps, 2**k, path) for k in range(3 if small else 7)}
    if not small:
        found["event net, pixels (T = 4, B = 2)"] = {s * s: network("dvs", 4, 2, path, s) for s in (64, 128, 192, 256)}
    return found


def often(run: Callable[[int], None]) -> tuple[Callable[[int], None], int]:
    """Warm up, and return a run that repeats this one until it takes ``LEAST``, and how many times."""
    run(0)
    run(0)
    started = time.process_time()
    run(0)
    count = max(1, math.ceil(LEAST / max(time.process_time() - started, 1e-4)))

    def repeated(number: int) -> None:
        for _ in range(count):
            run(number)

    return repeated, count


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Fit the slope of log time over log size where time is at least four times the smallest, or on the last three."""
    points = [(math.log(n), math.log(t)) for n, t in zip(sizes, seconds, strict=True) if t >= 4 * min(seconds)]
    if len(points) < 3:
        points = [(math.log(n), math.log(t)) for n, t in zip(sizes, seconds, strict=True)][-3:]
    mean_x, mean_y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def measure(rounds: int, *, small: bool) -> list[dict[str, Any]]:
    """Race the sizes of each growth."""
    records = []
    for name, runs in cases(small=small).items():
        repeated = {str(value): often(run) for value, (run, _) in runs.items()}
        found = race({value: run for value, (run, _) in repeated.items()}, rounds, lambda *_: None)
        found = {value: [t / repeated[value][1] for t in spent] for value, spent in found.items()}
        seconds = {value: median(found[str(value)]) for value in runs}
        cost = {value: 1e9 * seconds[value] / runs[value][1] for value in runs}
        records.append({
            "growth": name, "seconds": seconds, "nanoseconds_per_value": cost, "rounds": found,
            "exponent": exponent(list(runs), list(seconds.values())),
        })  # fmt: skip
    return records


def table(results: dict[str, Any]) -> str:
    """Write the results as Markdown."""
    head = (
        f"{measured(results['provenance'])}. Medians of {results['rounds']} rounds in turns, CPU time of forward and "
        "backward. Values: those of the input (B T N). Last / least: cost per value of the largest size over the smallest cost."
    )
    lines = [
        head,
        "",
        "| Growth | From - to | ms | ns per value | Last / least | Exponent |",
        "|---|---|---|---|---|---|",
    ]
    for record in results["records"]:
        sizes, cost, spent = (list(part) for part in (record["seconds"], record["nanoseconds_per_value"].values(), record["seconds"].values()))  # fmt: skip
        lines.append(
            f"| {record['growth']} | {sizes[0]} - {sizes[-1]} | {', '.join(f'{1000 * t:.3g}' for t in spent)} | "
            f"{', '.join(f'{c:.2g}' for c in cost)} | {list(cost)[-1] / min(cost):.2f} | {record['exponent']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw every growth on logarithmic axes, beside a straight line of slope 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = results["records"]
    columns = min(4, len(records))
    figure, grid = plt.subplots(
        math.ceil(len(records) / columns), columns, figsize=(3.1 * columns, 3.1 * math.ceil(len(records) / columns)),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for axes in grid.flat[len(records) :]:
        axes.set_axis_off()
    for axes, record in zip(grid.flat, records, strict=False):
        sizes, spent = [int(n) for n in record["seconds"]], [1000 * t for t in record["seconds"].values()]
        axes.loglog(sizes, spent, "o-", color="C0", markersize=4)
        axes.loglog(sizes, [spent[-1] * n / sizes[-1] for n in sizes], "--", color="0.6", linewidth=1)
        axes.set_title(f"{record['growth']}\nexponent {record['exponent']:.2f}", fontsize=9)
        axes.set_ylabel("ms")
        axes.tick_params(axis="x", which="minor", labelbottom=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the benchmark itself")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = {
        "provenance": provenance(["torch", "sg-lightning"]), "rounds": args.rounds,
        "records": measure(args.rounds, small=args.small),
    }  # fmt: skip
    save(results, table(results), args.out, "scaling")
    plot(results, args.out / "scaling.png")
    print(table(results))


if __name__ == "__main__":
    main()
