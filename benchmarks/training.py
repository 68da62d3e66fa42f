"""Training and attack steps of whole networks: ours against snnTorch, spikingjelly and the same network with ReLU.

    python benchmarks/training.py

You will see: CPU time of a training step (forward, backward, SGD with momentum) and of a PGD step (gradient with respect
to the input, projection) of every contestant, in turns, and the ratio to snnTorch stepped over time (what most code does)
and to the floor, the same network with every neuron replaced by ReLU. All contestants have the same weights; that spikes
and gradients agree is checked before anything is timed. spikingjelly takes part where it is installed.
Results go to benchmarks/results (training.json, training.md, training.png); those of networks not named stay.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import networks
import torch
from networks import NETWORKS, Folded, Network
from timing import measured, provenance, race, ratios
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sg_lightning.attacks import Oracle
from sg_lightning.attacks.losses import cross_entropy as attack_loss

ROOT = Path(__file__).parent.parent
STEP, FOLD, JELLY = "snnTorch, stepped", "snnTorch, folded", "spikingjelly, multi-step"
OURS, COMPILED, FLOOR = "ours", "ours, compiled", "ReLU (floor)"


class Static(nn.Module):
    """A network that makes its sequence from a constant input, so that an attack changes (B, ...)."""

    def __init__(self, net: nn.Module, network: Network) -> None:
        super().__init__()
        self.net, self.network = net, network

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of (B, ...) or, with time in the sample, of (B, T, ...)."""
        return self.net(x.expand(self.network.steps, *x.shape) if self.network.constant else x.transpose(0, 1))


def contestants(network: Network) -> dict[str, nn.Module]:
    """Return the networks of all contestants, with equal weights."""
    layers = network.weights()
    found = {
        STEP: networks.SnnTorchSteps(layers, network.beta),
        FOLD: networks.snntorch_fold(layers, network.beta),
        OURS: Folded(layers, networks.ours(network.beta)),
        COMPILED: networks.Compiled(layers, networks.ours(network.beta)),
        FLOOR: networks.floor(layers),
    }
    if importlib.util.find_spec("spikingjelly") and all(
        layer.feedback is None for layer in layers if isinstance(layer, networks.Mark)
    ):
        found[JELLY] = networks.spikingjelly(layers, network.beta)
    return {name: Static(net, network) for name, net in found.items()}


def batch(network: Network, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Return inputs (B, ...) or, as a view with time first in memory, (B, T, ...), and labels."""
    sequence, y = network.inputs()
    x = sequence[0] if network.constant else sequence.transpose(0, 1)
    return x.to(device), y.to(device)


def check(nets: dict[str, nn.Module], network: Network, device: str = "cpu") -> dict[str, Any]:
    """Refuse to time networks that are silent or not the same.

    snnTorch stepped over time normalises every step by itself in training, so it is compared in evaluation state, with
    the running statistics that one pass of ours leaves.

    Raises:
        RuntimeError: if they are not.
    """
    x, y = batch(network, device)
    rates = networks.firing(
        nets[OURS].train().net, x.expand(network.steps, *x.shape) if network.constant else x.transpose(0, 1)
    )
    if not all(0.05 <= rate <= 0.5 for rate in rates):
        raise RuntimeError(f"every layer must fire in 5 to 50 % of its steps, got {rates}")
    differences: dict[str, float] = {}
    reference: dict[bool, tuple[Tensor, Tensor]] = {}
    names = [OURS, *(name for name in nets if name not in (OURS, FLOOR))]
    for training in (True, False):
        for name in names:
            net = nets[name]
            if training and name == STEP:
                continue
            if not training:
                for norm, ours in zip(_norms(net), _norms(nets[OURS]), strict=True):
                    norm.load_state_dict(ours.state_dict())
            point = x.clone().requires_grad_()
            z = net.train(training)(point)
            (g,) = torch.autograd.grad(cross_entropy(z, y), point)
            if name == OURS:
                reference[training] = z.detach(), g
                continue
            other, slope = reference[training]
            if not torch.allclose(z, other, rtol=0, atol=2e-5 * float(other.abs().max())):
                raise RuntimeError(f"{name} computes other logits than ours: {float((z - other).abs().max())} apart")
            differences[f"{name}, {'training' if training else 'evaluation'}"] = float(
                (g - slope).norm() / slope.norm()
            )
    if max(differences.values()) > 1e-3:
        raise RuntimeError(f"input gradients differ: {differences}")
    return {"firing": rates, "gradients_relative": differences}


def _norms(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def training_step(net: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype | None) -> Callable[[int], None]:
    """Return one step of SGD with momentum."""
    optimiser = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)

    def run(_: int) -> None:
        net.train()
        optimiser.zero_grad()
        with _cast(dtype, x):
            loss = cross_entropy(net(x).float(), y)
        loss.backward()
        optimiser.step()

    return run


def attack_step(
    net: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype | None, *, backward: bool
) -> Callable[[int], None]:
    """Return three steps of PGD by sign; ``backward``: with ``loss.backward()``, as is usual, else our oracle."""

    def project(point: Tensor, grad: Tensor) -> Tensor:
        return (x + (point + 0.01 * grad.sign() - x).clamp(-0.03, 0.03)).clamp(0, 1)

    def usual(_: int) -> None:
        net.eval()
        point = x.clone()
        for _step in range(3):
            point = point.detach().requires_grad_()
            with _cast(dtype, x):
                loss = cross_entropy(net(point).float(), y)
            if backward:
                net.zero_grad()
                loss.backward()
                grad = point.grad
            else:
                (grad,) = torch.autograd.grad(loss, point)
            point = project(point.detach(), grad)

    def engine(_: int) -> None:
        oracle, point = Oracle(net, autocast=dtype), x
        with oracle.attacking(fold=True):
            for _step in range(3):
                point = project(point, oracle.value_and_grad(point, y, attack_loss).grad)

    return engine if isinstance(net.net, Folded) and not isinstance(net.net, networks.Repeated) else usual


def _cast(dtype: torch.dtype | None, x: Tensor) -> Any:
    return nullcontext() if dtype is None else torch.autocast(x.device.type, dtype)


def measure(name: str, rounds: int, precisions: Sequence[str]) -> list[dict[str, Any]]:
    """Race the contestants on one network."""
    network = NETWORKS[name]
    nets = contestants(network)
    checked = check(nets, network)
    x, y = batch(network)
    runs: dict[str, Callable[[int], None]] = {}
    for precision in precisions:
        dtype = None if precision == "fp32" else torch.bfloat16
        for who, net in nets.items():
            runs[f"train | {precision} | {who}"] = training_step(net, x, y, dtype)
            usual = who in (STEP, FOLD, JELLY)
            runs[f"pgd | {precision} | {who}"] = attack_step(net, x, y, dtype, backward=usual)
            if who in (FOLD, JELLY):
                runs[f"pgd | {precision} | {who}, input gradient only"] = attack_step(net, x, y, dtype, backward=False)
    first: dict[str, float] = {}
    for key, run in runs.items():  # compilation, caches, allocator
        started = time.perf_counter()
        run(0)
        first[key] = time.perf_counter() - started
        run(0)
    seconds = race(runs, rounds, lambda *_: None)
    records = []
    for key, spent in seconds.items():
        kind, precision, who = key.split(" | ")
        records.append({
            "network": name, "kind": kind, "precision": precision, "contestant": who, "seconds": spent,
            "first_call": first[key],
            "speedup": ratios(seconds[f"{kind} | fp32 | {STEP}"], spent),
            "over_floor": ratios(spent, seconds[f"{kind} | {precision} | {FLOOR}"]),
            "checked": checked,
        })  # fmt: skip
        print(
            f"{name} | {key}: {median(records[-1]['speedup']):.2f}, {median(records[-1]['over_floor']):.2f}",
            file=sys.stderr,
        )
    return records


def spread(values: Sequence[float]) -> str:
    """Write median and quartiles."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    low, _, high = quantiles(values, n=4, method="inclusive")
    return f"{median(values):.2f} ({low:.2f}-{high:.2f})"


def table(results: dict[str, Any]) -> str:
    """Write the results as Markdown."""
    head = (
        "Medians of rounds in turns, quartiles in brackets; CPU time. Speed-up is over snnTorch stepped over time in fp32, whose "
        "PGD steps call `loss.backward()`; time / floor is against the network with ReLU in the same precision. A PGD row is "
        "three steps."
    )
    lines = [head]
    for name, one in results.items():
        lines += [
            "", f"**{name}**: {one['title']}, B = {one['batch']}; {one['rounds']} rounds. {measured(one['provenance'])}.",
            "", "| Step | Precision | Contestant | ms | Speed-up | Time / floor |", "|---|---|---|---|---|---|",
        ]  # fmt: skip
        for record in one["records"]:
            lines.append(
                f"| {record['kind']} | {record['precision']} | {record['contestant']} | "
                f"{1000 * median(record['seconds']):.0f} | {spread(record['speedup'])} | {spread(record['over_floor'])} |"
            )
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw time relative to the floor: a panel per step, a network per row, a contestant per marker."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    from sg_lightning.reporting.style import looks

    records = [record for one in results.values() for record in one["records"]]
    rows = list(dict.fromkeys((r["network"], r["precision"]) for r in records))
    names = list(dict.fromkeys(r["contestant"] for r in records if r["contestant"] != FLOOR))
    look = looks(names)
    figure = Figure(figsize=(10.5, 1.6 + 0.34 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, sharex=True)
    for axes, kind in zip(panels, ("train", "pgd"), strict=True):
        for name in names:
            found = [r for r in records if r["kind"] == kind and r["contestant"] == name]
            axes.plot(
                [median(r["over_floor"]) for r in found], [rows.index((r["network"], r["precision"])) for r in found],
                look[name].marker, color=look[name].colour, label=name, markersize=7, alpha=0.8,
            )  # fmt: skip
        axes.axvline(1.0, color="0.3", linewidth=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks([1, 1.5, 2, 3, 5, 10, 20])
        axes.set_title({"train": "training step", "pgd": "PGD step"}[kind], fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(rows)), [", ".join(row) for row in rows], fontsize=9)
    panels[0].invert_yaxis()
    figure.supxlabel("time / time of the same network with ReLU: lower is better", fontsize=9)
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--networks", nargs="+", default=["vgg", "shd", "shd-16", "shd-recurrent", "dvs"], choices=NETWORKS
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "training.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name in args.networks:  # those of other runs stay
        results[name] = {
            "title": NETWORKS[name].title, "batch": NETWORKS[name].batch, "rounds": args.rounds,
            "records": measure(name, args.rounds, args.precisions),
            "provenance": provenance(["torch", "snntorch", "spikingjelly", "sg-lightning"]),
        }  # fmt: skip
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (args.out / "training.md").write_text(table(results), encoding="utf-8")
    plot(results, args.out / "training.png")
    print(table(results))


if __name__ == "__main__":
    main()
