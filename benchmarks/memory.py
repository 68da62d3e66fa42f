"""Memory of a training step: bytes kept for the backward pass, and the peak of a process.

    python benchmarks/memory.py

You will see, for a single layer and for the networks of benchmarks/training.py, the bytes that each contestant keeps
between forward and backward (each storage once, parameters left out), and the growth of the peak resident memory of a
process of its own by three training steps. Results go to benchmarks/results (memory.json, memory.md).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from networks import NETWORKS, Mark, Network
from timing import measured, provenance
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import OURS, batch, contestants, training_step

ROOT = Path(__file__).parent.parent
LAYERS = {
    f"layer-{steps}": Network(f"one layer, 16,384 neurons, T = {steps}", lambda: [Mark(), nn.Flatten(), nn.Linear(16_384, 10)],
                              (16_384,), steps=steps, batch=1, constant=False)
    for steps in (4, 8, 25, 100)
}  # fmt: skip


def kept(net: nn.Module, x: Tensor, y: Tensor) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, without parameters and inputs."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()} | {x.untyped_storage().data_ptr()}
    sizes: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        loss = cross_entropy(net.train()(x), y)
    total = sum(sizes.values())
    loss.backward()
    return total


def peak(name: str, contestant: str) -> float:
    """Return by how many bytes three training steps raise the peak of a process."""
    command = [sys.executable, __file__, "--one", name, contestant]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def one(name: str, contestant: str) -> None:
    """Print the growth of this process's peak."""
    torch.set_num_threads(1)
    network = {**NETWORKS, **LAYERS}[name]
    net, (x, y) = contestants(network)[contestant], batch(network)
    run = training_step(net, x, y, None)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is that of the imports
    for step in range(3):
        run(step)
    print(_resident("VmHWM") - before)


def _resident(what: str) -> int:
    """Return the resident memory of this process, or its peak, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))


def measure(name: str, *, processes: bool) -> dict[str, Any]:
    """Measure every contestant on one network."""
    network = {**NETWORKS, **LAYERS}[name]
    x, y = batch(network)
    found: dict[str, Any] = {}
    for who, net in contestants(network).items():
        # An input that asks for its gradient, as in the middle of a network.
        point = x.clone().requires_grad_(name in LAYERS)
        found[who] = {"kept": kept(net, point, y), "peak": peak(name, who) if processes else None}
    return {"title": network.title, "input": x.numel() * 4, "contestants": found}


def table(results: dict[str, Any]) -> str:
    """Write the results as Markdown."""
    lines = [
        f"{measured(results['provenance'])}. float32. Kept: bytes between forward and backward, in MB and relative to ours.",
        "", "| Network | Contestant | Kept, MB | Relative to ours | In units of the layer's input | Peak of a process, MB |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, network in results["networks"].items():
        ours = network["contestants"][OURS]["kept"]
        for who, row in network["contestants"].items():
            units = f"{row['kept'] / network['input']:.2f}" if name in LAYERS else ""
            top = "" if row["peak"] is None else f"{row['peak'] / 1e6:.0f}"
            lines.append(
                f"| {network['title']} | {who} | {row['kept'] / 1e6:.2f} | {row['kept'] / ours:.2f} | {units} | {top} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=[*LAYERS, "vgg", "shd", "shd-recurrent", "dvs"])
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "CONTESTANT"), help="print the peak of this process")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(arguments)
    if args.one:
        one(*args.one)
        return
    results = {
        "provenance": provenance(["torch", "snntorch", "spikingjelly", "sg-lightning"]),
        "networks": {name: measure(name, processes=name in NETWORKS) for name in args.networks},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "memory.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (args.out / "memory.md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
