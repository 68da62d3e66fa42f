"""What a layer of LIF neurons costs, forward and backward, beside snnTorch, spikingjelly and a ReLU.

    python benchmarks/neurons.py [--quick]

You will see: for each size a row with the time of snnTorch's neuron in a loop over `x.unbind(0)`, how many times faster
spikingjelly's multi-step neuron and our two CPU paths are, and our time in units of a ReLU on the same tensor. Equal
spikes and gradients are checked before anything is timed. The peer that is not installed is left out:
`pip install --no-deps spikingjelly==2.0.0 loguru`. Results go to benchmarks/results (neurons.json, .md, .png).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import snntorch
import torch
from snntorch import surrogate as snntorch_surrogates
from timing import measured, provenance, race, ratios, save
from torch import Tensor

from sg_lightning.callbacks.speed import keep_freed_memory
from sg_lightning.neurons import LIF, use_path
from sg_lightning.neurons.surrogates import Atan

RESULTS = Path(__file__).parent / "results"
BETA = 0.5
BASE = "snnTorch"
SIZES = [(1_024, 8), (1_024, 100), (16_384, 4), (16_384, 8), (16_384, 25), (16_384, 100), (262_144, 4), (262_144, 8),
         (262_144, 25), (262_144, 100), (1_048_576, 8)]  # fmt: skip
HALF = [(16_384, 8), (262_144, 8)]
Layer = Callable[[Tensor], Tensor]


def snntorch_loop() -> Layer:
    neuron = snntorch.Leaky(BETA, spike_grad=snntorch_surrogates.atan(2.0), reset_mechanism="zero")

    def run(x: Tensor) -> Tensor:
        membrane, spikes = torch.zeros(x.shape[1:], device=x.device), []  # float32, as under autocast
        for step in x.unbind(0):
            spike, membrane = neuron(step, membrane)
            spikes.append(spike)
        return torch.stack(spikes).to(x.dtype)

    return run


def spikingjelly_layer(device: str = "cpu") -> Layer | None:
    try:
        from spikingjelly.activation_based import neuron, surrogate
    except ImportError:
        return None
    layer = neuron.LIFNode(
        tau=1 / (1 - BETA), decay_input=False, v_threshold=1.0, v_reset=0.0, detach_reset=True, step_mode="m",
        surrogate_function=surrogate.ATan(alpha=2.0),
    ).to(device)  # fmt: skip

    def run(x: Tensor) -> Tensor:
        layer.reset()
        return layer(x.float()).to(x.dtype)

    run.module = layer  # type: ignore[attr-defined]
    return run


def ours(path: Any) -> Layer:
    neuron = LIF(BETA, 1.0, "zero", detach_reset=True, surrogate=Atan(2.0))

    def run(x: Tensor) -> Tensor:
        with use_path(path):
            return neuron(x)

    return run


def layers() -> dict[str, Layer]:
    found = {
        BASE: snntorch_loop(), "spikingjelly": spikingjelly_layer(), "eager": ours("eager"),
        "compiled": ours("compiled"), "ReLU": torch.relu,
    }  # fmt: skip
    return {name: layer for name, layer in found.items() if layer is not None}


def gradient(layer: Layer, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    out = layer(x)
    return out.detach(), torch.autograd.grad(out, x, g)[0]


def check(contestants: dict[str, Layer], x: Tensor, g: Tensor) -> dict[str, Any]:
    """Refuse to time what does not compute the same; return the share of spikes and the differences."""
    spikes, expected = gradient(contestants[BASE], x, g)
    rate = spikes.float().mean().item()
    if not 0.05 < rate < 0.5:
        raise SystemExit(f"{rate:.3f} of the neurons fire: choose an input that makes 5 to 50 % fire")
    found: dict[str, Any] = {"rate": round(rate, 3)}
    for name, layer in contestants.items():
        if name in (BASE, "ReLU"):
            continue
        other, grad = gradient(layer, x, g)
        flips = int((other != spikes).sum())
        # A flipped spike is another function; spikingjelly fires at equality, and so may differ at ties.
        same = (other == spikes).all(0)
        off = ((grad - expected).abs()[:, same].max() / expected.abs().max()).item()
        found[name] = {"flips": flips, "gradient": off}
        if (flips and not name.startswith("spikingjelly")) or off > (1e-2 if x.dtype == torch.bfloat16 else 1e-5):
            raise SystemExit(f"{name} differs from {BASE}: {flips} flips, gradient off by {off:.1e}")
    return found


def kept_bytes(layer: Layer, x: Tensor) -> int:
    """Return what a layer keeps for its backward pass, each storage once."""
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        layer(x)
    return sum(kept.values())


def measure(size: int, steps: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Time one size."""
    torch.manual_seed(0)
    x = (torch.randn(steps, size) * 0.8 + 0.3).to(dtype).requires_grad_()
    g = torch.randn(steps, size).to(dtype)
    contestants = layers()
    checked = check(contestants, x, g)
    repeats = max(1, 2_000_000 // (size * steps))

    def timed(layer: Layer) -> Callable[[int], None]:
        def run(number: int) -> None:
            for _ in range(repeats):
                gradient(layer, x, g)

        return run

    runs = {name: timed(layer) for name, layer in contestants.items()}
    for _ in range(2):
        for run in runs.values():
            run(0)
    seconds = race(runs, rounds, lambda name, result: None)
    row = {
        "neurons": size, "steps": steps, "dtype": str(dtype).removeprefix("torch."), "repeats": repeats, "check": checked,
        "kept": {n: kept_bytes(layer, x) / (x.numel() * 4) for n, layer in contestants.items()},
        "seconds": {name: [s / repeats for s in values] for name, values in seconds.items()},
    }  # fmt: skip
    print(f"  {size} neurons, {steps} steps, {row['dtype']}: {speeds(row)}", file=sys.stderr)
    return row


def speeds(row: dict[str, Any]) -> dict[str, float]:
    base = row["seconds"][BASE]
    return {
        name: round(statistics.median(ratios(base, values)), 2)
        for name, values in row["seconds"].items()
        if name != BASE
    }


def compile_seconds() -> dict[int, list[float]]:
    """Time the compilation of forward and backward at several lengths, in a fresh process without caches."""
    code = (
        "import json, time, torch; torch.set_num_threads(1); from sg_lightning.neurons import LIF, use_path; "
        "use_path('compiled'); found = {}\n"
        "for steps in (4, 8, 25, 100):\n"
        "    x = torch.randn(steps, 1, 4096).requires_grad_(); n = LIF(0.5, detach_reset=True, surrogate='atan')\n"
        "    a = time.perf_counter(); y = n(x); b = time.perf_counter(); y.sum().backward(); c = time.perf_counter()\n"
        "    found[steps] = [round(b - a, 2), round(c - b, 2)]\n"
        "print(json.dumps(found))"
    )
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "SG_LIGHTNING_NEURONS": "auto"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return {int(steps): values for steps, values in json.loads(done.stdout.splitlines()[-1]).items()}


def allocator(choice: str) -> str:
    """Set the allocator and name what is in force; as it comes, large tensors cost more than the neurons."""
    return "glibc, trimming and mmap off" if choice == "kept" and not keep_freed_memory() else "default"


def table(results: dict[str, Any]) -> str:
    """Write the results as Markdown."""
    rows = results["rows"]
    head = (
        f"{measured(results['provenance'])}; allocator: {results['allocator']}. Forward and gradient of the input of one "
        f"layer, beta {BETA}, threshold 1, reset to zero and detached, arctan surrogate; medians of paired ratios of CPU "
        "time, in brackets the quartiles. Times faster than the loop over snnTorch's neuron (`unbind`), and time in units "
        "of a ReLU's."
    )
    titles = [
        "neurons, steps, dtype", "snnTorch ms", "spikingjelly", "eager", "compiled", "ReLU", "eager / ReLU",
        "compiled / ReLU", "compiled, ns per neuron and step",
    ]  # fmt: skip
    lines = [head, "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        times = row["seconds"]
        cells = [f"{1e3 * statistics.median(times[BASE]):.2f}"]
        for name in ("spikingjelly", "eager", "compiled", "ReLU"):
            cells.append(_spread(ratios(times[BASE], times[name])) if name in times else "-")
        cells += [_spread(ratios(times[name], times["ReLU"])) for name in ("eager", "compiled")]
        cells.append(f"{1e9 * statistics.median(times['compiled']) / row['neurons'] / row['steps']:.2f}")
        lines.append(f"| {row['neurons']:,}, {row['steps']}, {row['dtype']} | {' | '.join(cells)} |")
    kept = rows[0]["kept"]
    flips = sum(row["check"].get("spikingjelly", {"flips": 0})["flips"] for row in rows)
    compiled = "; ".join(f"T={steps}: {f} + {b}" for steps, (f, b) in results["compile"].items())
    units = ", ".join(f"{name} {value:.2f}" for name, value in kept.items())
    foot = (
        f"Kept for the backward pass, in units of the input in float32 ({rows[0]['steps']} steps): {units}. Spikes of "
        f"eager and compiled are those of snnTorch to the bit in all rows; spikingjelly, which fires at equality: "
        f"{flips} flips, at ties of coarse inputs. Seconds to compile forward + backward without any cache (the first starts the "
        f"compiler, too): {compiled}."
    )
    return "\n".join([*lines, "", foot]) + "\n"


def _spread(values: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw speed-ups over snnTorch, and time per neuron and step."""
    from matplotlib.figure import Figure

    from sg_lightning.reporting.style import looks

    rows = [row for row in results["rows"] if row["dtype"] == "float32"]
    names = list(rows[0]["seconds"])
    look = looks(names)
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    ticks = [f"{row['neurons'] // 1024}k, T={row['steps']}" for row in rows]
    for number, title in enumerate(("times faster than snnTorch", "ns per neuron and step"), start=1):
        axes = figure.add_subplot(1, 2, number)
        for name in names:
            values = [
                statistics.median(ratios(row["seconds"][BASE], row["seconds"][name])) if number == 1
                else 1e9 * statistics.median(row["seconds"][name]) / row["neurons"] / row["steps"]
                for row in rows
            ]  # fmt: skip
            axes.plot(range(len(rows)), values, look[name].marker + "-", color=look[name].colour, label=name)
        axes.set_yscale("log")
        axes.set_xticks(range(len(rows)), ticks, rotation=60, fontsize=7)
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two sizes, three rounds")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--allocator", choices=["kept", "default"], default="kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    made = provenance(["torch", "snntorch", "spikingjelly", "numpy", "sg-lightning"])
    results: dict[str, Any] = {"provenance": made, "allocator": allocator(args.allocator)}
    cases = [(n, t, torch.float32) for n, t in SIZES] + [(n, t, torch.bfloat16) for n, t in HALF]
    cases, rounds = ([case for case in cases if case[:2] in HALF], 3) if args.quick else (cases, args.rounds)
    results["rows"] = [measure(*case, rounds) for case in cases]
    results["compile"] = compile_seconds()
    save(results, table(results), args.out, "neurons")
    draw(results, args.out / "neurons.png")
    print(table(results))


if __name__ == "__main__":
    main()
