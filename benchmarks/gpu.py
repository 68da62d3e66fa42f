"""What spiking layers, training, attacks and the sparse-gradient step cost on a GPU.

    python benchmarks/gpu.py

You will see, each in turns with all contestants and after a check that they compute the same: forward and backward of one
LIF layer (Triton kernels) beside snnTorch's loop, spikingjelly on its fastest backend and a ReLU; training steps of
VGG-11, the dense and the event net; PGD with and without CUDA graphs (equal adversarial examples); a sparse-gradient step
on VGG-11 against the official arithmetic. Wall-clock time until the GPU is done. A GPU with 24 GB takes about ten minutes.
Results go to benchmarks/results (gpu.json, gpu.md). `--device cpu --small` tries the benchmark itself.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import neurons
import sparse_gradient
import torch
import training
from networks import NETWORKS
from timing import measured, provenance, race, ratios, save
from torch import Tensor, nn
from training import FLOOR, OURS, STEP, spread

from sg_lightning.attacks import APGD, PGD, Attack, Oracle
from sg_lightning.attacks.capture import cuda_graph
from sg_lightning.backbones import ConvNet
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import Linf

ROOT = Path(__file__).parent.parent
JELLY_BACKENDS = ("triton", "cupy")


def clock_of(device: str) -> Callable[[], float]:
    """Return what tells wall-clock seconds once the device has done what it was asked to."""

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    return now


def fastest_backend(module: nn.Module, device: str, ask: Callable[[], Any]) -> str:
    """Set spikingjelly's neurons in a module to the fastest backend that works here, and name it."""
    nodes = [m for m in module.modules() if hasattr(m, "supported_backends")]
    for backend in JELLY_BACKENDS if device == "cuda" else ():
        try:
            for node in nodes:
                node.backend = backend
            ask()
        except Exception as error:  # noqa: BLE001 - whatever a backend that is not there says
            print(f"spikingjelly without {backend}: {type(error).__name__}")
        else:
            return backend
    for node in nodes:
        node.backend = "torch"
    return "torch"


def rows_of(case: str, found: dict[str, list[float]], base: str, floor: str | None) -> list[dict[str, Any]]:
    """Return a row per contestant: seconds, times faster than ``base``, time in units of ``floor``."""
    return [
        {
            "case": case, "contestant": name, "seconds": spent, "speedup": ratios(found[base], spent),
            "over_floor": None if floor is None else ratios(spent, found[floor]),
        }
        for name, spent in found.items()
    ]  # fmt: skip


def warmed(runs: dict[str, Callable[[int], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Race after two warm-ups."""
    for run in runs.values():
        run(0)
        run(0)
    return race(runs, rounds, lambda *_: None, clock=clock_of(device))


def layer(size: int, steps: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Race one layer of neurons."""
    torch.manual_seed(0)
    x = (torch.randn(steps, size) * 0.8 + 0.3).to(device).requires_grad_()
    g = torch.randn(steps, size).to(device)
    contestants: dict[str, neurons.Layer] = {neurons.BASE: neurons.snntorch_loop(), "ReLU": torch.relu}
    jelly = neurons.spikingjelly_layer(device)
    if jelly is not None:
        backend = fastest_backend(jelly.module, device, lambda: neurons.gradient(jelly, x, g))
        contestants[f"spikingjelly, {backend}"] = jelly
    contestants["eager"] = neurons.ours("eager")
    contestants[OURS] = neurons.ours("auto")
    neurons.check(contestants, x, g)
    repeats = max(1, 20_000_000 // (size * steps))

    def often(one: neurons.Layer) -> Callable[[int], None]:
        def run(_: int) -> None:
            for _again in range(repeats):
                neurons.gradient(one, x, g)

        return run

    found = warmed({name: often(one) for name, one in contestants.items()}, rounds, device)
    found = {name: [t / repeats for t in spent] for name, spent in found.items()}
    return rows_of(f"layer, {size:,} neurons, T = {steps}", found, neurons.BASE, "ReLU")


def agree(nets: dict[str, nn.Module], x: Tensor) -> None:
    """Refuse networks that predict something else than ours on the device.

    Raises:
        RuntimeError: if they do.
    """
    with torch.no_grad():
        expected = nets[OURS].eval()(x)
        for who, net in nets.items():
            z = net.eval()(x)
            same = float((z.argmax(1) == expected.argmax(1)).float().mean())
            if who != FLOOR and (same < 0.95 or float((z - expected).norm() / expected.norm()) > 0.05):
                raise RuntimeError(f"{who} predicts other classes than ours: {same:.3f} equal")


def network(name: str, batch: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Race training steps of a network in both precisions."""
    chosen = replace(NETWORKS[name], batch=batch)
    nets = {who: net for who, net in training.contestants(chosen).items() if who != training.COMPILED}
    training.check(nets, NETWORKS[name])  # on the CPU, where all round alike; on the GPU what is left is rounding
    x, y = training.batch(chosen, device)
    nets = {who: net.to(device) for who, net in nets.items()}
    if training.JELLY in nets:
        jelly = nets.pop(training.JELLY)
        backend = fastest_backend(jelly, device, lambda: jelly(x).sum().backward())
        nets[f"spikingjelly, {backend}"] = jelly
    agree(nets, x)
    rows = []
    for precision, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
        runs = {who: training.training_step(net, x, y, dtype) for who, net in nets.items()}
        case = f"training step, {chosen.title}, B = {batch}, {precision}"
        rows += rows_of(case, warmed(runs, rounds, device), STEP, FLOOR)
    return rows


def attack(attack: Attack, batch: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Race an attack on a convolutional network with and without CUDA graphs, which must find the same."""
    torch.manual_seed(0)
    net = ConvNet(input_size=32, in_channels=3, channels=(64, 128, 256), hidden=256, time_steps=4).to(device).eval()
    x = torch.rand(batch, 3, 32, 32).to(device)
    y = net(x).argmax(1)
    results: dict[str, Tensor] = {}

    def run_with(name: str, record: Any) -> Callable[[int], None]:
        def run(_: int) -> None:
            noise = SampleGenerator.from_ids(0, list(range(batch)))
            results[name] = attack.run(Oracle(net, record=record), x, y, generator=noise, early_drop=False).x_adv  # type: ignore[assignment]

        return run

    runs = {"as it is": run_with("as it is", None)}
    if device == "cuda":
        runs["CUDA graphs"] = run_with("CUDA graphs", cuda_graph)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an attack that goes on without graphs says so
        found = warmed(runs, rounds, device)
    apart = max(float((one - results["as it is"]).abs().max()) for one in results.values())
    if apart > 1e-3:
        raise RuntimeError(f"{attack.name} finds other examples in CUDA graphs: {apart} apart")
    return rows_of(f"{attack.name}, B = {batch}", found, "as it is", None)


def sparse(batch: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Race a sparse-gradient step."""
    steps = 8
    sparse_gradient.check()
    ways = sparse_gradient.measure(steps, batch, rounds, device, clock_of(device))
    found = {name: way["seconds"] for name, way in ways.items()}
    case = f"sparse-gradient step, VGG-11, T = {steps}, B = {batch}"
    return rows_of(case, found, sparse_gradient.BASE, "ReLU (floor), fp32")


def measure(rounds: int, device: str, *, small: bool) -> list[dict[str, Any]]:
    """Race everything."""
    if small:
        return [
            *layer(2048, 8, rounds, device), *network("tiny", 4, rounds, device),
            *attack(PGD(Linf(0.03), steps=2), 2, rounds, device),
        ]  # fmt: skip
    rows: list[dict[str, Any]] = []
    for size, steps in ((65_536, 8), (65_536, 100), (1_048_576, 8), (1_048_576, 25), (8_388_608, 8)):
        rows += layer(size, steps, rounds, device)
    for name, batch in (("vgg", 128), ("shd", 256), ("dvs", 16)):
        rows += network(name, batch, rounds, device)
    for batch in (8, 128):
        for kind in (PGD(Linf("8/255"), steps=40), APGD(Linf("8/255"), steps=50)):
            rows += attack(kind, batch, rounds, device)
    return [*rows, *sparse(16, rounds, device), *sparse(128, max(2, rounds // 2), device)]


def table(results: dict[str, Any]) -> str:
    """Write the results as Markdown."""
    head = (
        f"{measured(results['provenance'])}; {results['gpu']}. {results['rounds']} rounds in turns; medians, quartiles in "
        "brackets; wall-clock time until the GPU is done. TF32 is off. Speed-up is over the first contestant, time / floor "
        "against ReLU."
    )
    lines = [head, "", "| Case | Contestant | ms | Speed-up | Time / floor |", "|---|---|---|---|---|"]
    for row in results["rows"]:
        floor = "" if row["over_floor"] is None else spread(row["over_floor"])
        lines.append(
            f"| {row['case']} | {row['contestant']} | {1000 * median(row['seconds']):.3g} | {spread(row['speedup'])} | {floor} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the benchmark itself")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use: --device cpu --small tries the benchmark itself")
    torch.backends.cudnn.allow_tf32 = False
    results = {
        "provenance": provenance(["torch", "triton", "snntorch", "spikingjelly", "sg-lightning"]), "rounds": args.rounds,
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else "no GPU",
        "rows": measure(args.rounds, args.device, small=args.small),
    }  # fmt: skip
    save(results, table(results), args.out, "gpu")
    print(table(results))


if __name__ == "__main__":
    main()
