"""Memory of a training step: bytes kept for the backward pass, the peak of a process, and what saving them costs.

    python benchmarks/memory.py

You will see, for a single layer, the networks of benchmarks/training.py and WRN-16-4, the bytes that each contestant keeps
between forward and backward (each storage once, parameters left out), and the growth of the peak resident memory of a
process of its own by three training steps. Ours also with spikes in bytes and with activations computed again (callback
`SaveMemory`), whose gradients are checked to be equal, with the time of a training step relative to keeping everything.
Results go to benchmarks/results (memory.json, memory.md).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
import training
from networks import ALPHA, BETA, NETWORKS, Mark, Network
from timing import measured, provenance, race, ratios, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import FLOOR, OURS, batch, training_step

from sg_lightning.backbones import WideResNet, recompute
from sg_lightning.backbones.base import OverTime
from sg_lightning.neurons import LIF, compact_spikes, surrogates
from sg_lightning.neurons.compact import Packed, pack, unpack

ROOT = Path(__file__).parent.parent
LAYERS = {
    f"layer-{steps}": Network(f"one layer, 16,384 neurons, T = {steps}", lambda: [Mark(), nn.Flatten(), nn.Linear(16_384, 10)],
                              (16_384,), steps=steps, batch=1, constant=False)
    for steps in (4, 8, 25, 100)
}  # fmt: skip


WIDE = Network("WRN-16-4, 32 x 32, direct coding", list, (3, 32, 32), steps=4, batch=4)
LONG = replace(NETWORKS["shd"], title="dense 700-256-256-20, T = 1000", steps=1000, batch=16)
EVERY = {**NETWORKS, **LAYERS, "wrn16_4": WIDE, "shd-long": LONG}


class Way(NamedTuple):
    """How memory is saved."""

    spikes: bool = False
    again: Literal["norms", "blocks"] | int | None = None


WAYS = {
    "ours, spikes in bytes": Way(spikes=True),
    "ours, spikes in bytes, norms again": Way(spikes=True, again="norms"),
    "ours, spikes in bytes, blocks again": Way(spikes=True, again="blocks"),
    "ours, 10 steps at a time": Way(again=10),
}


def ways(net: nn.Module) -> dict[str, Way]:
    """Return the ways that make a difference to a network: norms are repeated, or forbid to go piece by piece."""
    norms = any(isinstance(part, nn.BatchNorm2d) for part in net.modules())
    return {name: way for name, way in WAYS.items() if (way.again != "norms" if not norms else way.again != 10)}


def contestants(network: Network) -> dict[str, nn.Module]:
    """Return the networks of all contestants; of the residual network, which we alone have, ours and its twin."""
    if network is not WIDE:
        return training.contestants(network)
    found = {}
    for name, spiking in ((OURS, True), (FLOOR, False)):
        torch.manual_seed(0)
        neuron = LIF(BETA, 1.0, detach_reset=True, surrogate=surrogates.Atan(ALPHA))
        found[name] = WideResNet(16, 4, time_steps=network.steps, neuron=neuron, spiking=spiking)
    return found


def kept(net: nn.Module, x: Tensor, y: Tensor, way: Way | None = None) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, without parameters and inputs."""
    way = way or Way()
    own = {p.untyped_storage().data_ptr() for p in net.parameters()} | {x.untyped_storage().data_ptr()}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no storage takes the place of another

    def keep(saved: Tensor) -> Tensor | Packed:
        if saved.untyped_storage().data_ptr() in own:
            return saved
        found = pack(saved) if way.spikes else saved
        alive.append(found.values if isinstance(found, Packed) else found)
        storage = alive[-1].untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return found

    _choose(net, way)
    with torch.autograd.graph.saved_tensors_hooks(keep, unpack):
        loss = cross_entropy(net.train()(x), y)
    total = sum(sizes.values())
    loss.backward()
    return total


def _choose(net: nn.Module, way: Way) -> None:
    if way.again is not None or any(isinstance(part, OverTime) for part in net.modules()):
        recompute(net, way.again)


def saving(step: Callable[[int], None], net: nn.Module, x: Tensor, way: Way) -> Callable[[int], None]:
    """Return a training step that saves memory."""

    def run(number: int) -> None:
        _choose(net, way)
        with compact_spikes([x]) if way.spikes else nullcontext():
            step(number)

    return run


def check(net: nn.Module, x: Tensor, y: Tensor) -> None:
    """Refuse to measure ways whose gradients or statistics are not those of keeping everything.

    Raises:
        RuntimeError: if they are not, bit for bit; piece by piece, if they are more than rounding apart.
    """
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found: dict[str, list[Tensor]] = {}
    for name, way in {OURS: Way(), **ways(net)}.items():
        net.load_state_dict(before)
        net.train().zero_grad()
        saving(lambda _: cross_entropy(net(x), y).backward(), net, x, way)(0)
        graded = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        found[name] = [*graded, *(value.clone() for value in net.buffers())]
        bound = 1e-4 if way.again == 10 else 0.0
        if any((a - b).abs().max() > bound * a.abs().max() for a, b in zip(found[OURS], found[name], strict=True)):
            raise RuntimeError(f"{name}: other gradients or statistics than those of keeping everything")
    net.load_state_dict(before)


def times(net: nn.Module, x: Tensor, y: Tensor, rounds: int) -> dict[str, list[float]]:
    """Return the time of a training step in every way, relative to keeping everything, by round."""
    step = training_step(net, x, y, None)
    runs = {name: saving(step, net, x, way) for name, way in {OURS: Way(), **ways(net)}.items()}
    for run in runs.values():
        run(0)
        run(0)
    seconds = race(runs, rounds, lambda *_: None)
    return {name: ratios(spent, seconds[OURS]) for name, spent in seconds.items()}


def peak(name: str, contestant: str) -> float:
    """Return by how many bytes three training steps raise the peak of a process."""
    command = [sys.executable, __file__, "--one", name, contestant]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def one(name: str, contestant: str) -> None:
    """Print the growth of this process's peak."""
    torch.set_num_threads(1)
    network, way = EVERY[name], WAYS.get(contestant, Way())
    net, (x, y) = contestants(network)[OURS if contestant in WAYS else contestant], batch(network)
    run = saving(training_step(net, x, y, None), net, x, way)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is that of the imports
    for step in range(3):
        run(step)
    print(_resident("VmHWM") - before)


def _resident(what: str) -> int:
    """Return the resident memory of this process, or its peak, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))


def measure(name: str, *, processes: bool, rounds: int) -> dict[str, Any]:
    """Measure every contestant on one network."""
    network = EVERY[name]
    x, y = batch(network)
    nets = contestants(network)
    spent: dict[str, list[float]] = {}
    if name not in LAYERS:
        check(nets[OURS], x, y)
        spent = times(nets[OURS], x, y, rounds)
    found: dict[str, Any] = {}
    for who in [*nets, *(ways(nets[OURS]) if name not in LAYERS else [])]:
        # An input that asks for its gradient, as in the middle of a network.
        point = x.clone().requires_grad_(name in LAYERS)
        found[who] = {
            "kept": kept(nets[OURS if who in WAYS else who], point, y, WAYS.get(who)),
            "peak": peak(name, who) if processes else None,
            "time": spent.get(who),
        }
        print(name, who, found[who]["kept"], found[who]["peak"], file=sys.stderr)
    return {"title": f"{network.title}, B = {network.batch}", "input": x.numel() * 4, "contestants": found}


def table(results: dict[str, Any]) -> str:
    """Write the results as Markdown."""
    head = (
        f"{measured(results['provenance'])}. float32. Kept: bytes between forward and backward, in MB and relative to ours. "
        "Peak: growth by three training steps, with gradients and momentum. Time: of a training step relative to ours, "
        f"median of {results['rounds']} rounds in turns (in brackets the extremes). The ReLU net "
        "sees a constant input once, in one step; snnTorch's and ours have T steps behind the first layer."
    )
    lines = [
        head, "", "| Network | Contestant | Kept, MB | Relative to ours | In units of the layer's input | Peak of a process, MB | Time |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, network in results["networks"].items():
        ours = network["contestants"][OURS]["kept"]
        for who, row in network["contestants"].items():
            units = f"{row['kept'] / network['input']:.2f}" if name in LAYERS else ""
            top = "" if row["peak"] is None else f"{row['peak'] / 1e6:.0f}"
            spent = row["time"] if who in WAYS else None
            cost = "" if spent is None else f"{median(spent):.2f} ({min(spent):.2f}-{max(spent):.2f})"
            lines.append(
                f"| {network['title']} | {who} | {row['kept'] / 1e6:.2f} | {row['kept'] / ours:.2f} | {units} | {top} | {cost} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=EVERY,
                        default=[*LAYERS, "vgg", "wrn16_4", "shd", "shd-long", "shd-recurrent", "dvs"])  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "CONTESTANT"), help="print the peak of this process")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(arguments)
    if args.one:
        one(*args.one)
        return
    torch.set_num_threads(1)
    results = {
        "rounds": args.rounds,
        "provenance": provenance(["torch", "snntorch", "spikingjelly", "sg-lightning"]),
        "networks": {name: measure(name, processes=name not in LAYERS, rounds=args.rounds) for name in args.networks},
    }
    save(results, table(results), args.out, "memory")
    print(table(results))


if __name__ == "__main__":
    main()
