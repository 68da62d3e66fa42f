"""Training steps of a residual network, WRN-16-4: plain, with the sparse-gradient penalty, and adversarial.

    python benchmarks/residual.py

You will see: CPU time of a training step (SGD with momentum) in its three forms for our network, for the same network with
the neurons of snnTorch (stepped over time, or with time folded into the batch) or spikingjelly (multi-step) in the place of
ours, and with ReLU over all steps (the floor). Adversarial: three steps of PGD, whose gradients are taken with respect to the
input only by all. That all compute the same is checked before anything is timed.
Results go to benchmarks/results (residual.json, residual.md).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import networks
import torch
from networks import ALPHA, BETA, Mark
from timing import measured, provenance, race, ratios, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import COMPILED, FLOOR, FOLD, JELLY, OURS, STEP, spread

from sg_lightning.backbones import WideResNet
from sg_lightning.neurons import LIF, SpikingNeuron, surrogates, use_path
from sg_lightning.objectives import sparse_gradient_penalty

ROOT = Path(__file__).parent.parent
KINDS = ("plain", "sparse gradient", "adversarial")


class Instead(SpikingNeuron):
    """Another neuron in the place of ours, which sees sequences."""

    def __init__(self, neuron: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.neuron = neuron

    def forward(self, x: Tensor) -> Tensor:
        """Return what it makes of (T, B, ...)."""
        return self.neuron(x)


class _Step(nn.Module):
    """snnTorch's neuron for one step; it keeps its membrane."""

    def __init__(self) -> None:
        super().__init__()
        import snntorch

        self.neuron = snntorch.Leaky(
            beta=BETA, threshold=1.0, reset_mechanism="zero", spike_grad=snntorch.surrogate.atan(alpha=ALPHA)
        )
        self.membrane: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the spikes (1, B, ...) of the next step."""
        membrane = torch.zeros_like(x[0], dtype=torch.float32) if self.membrane is None else self.membrane
        spikes, self.membrane = self.neuron(x[0], membrane)
        return spikes.unsqueeze(0)


class Stepped(nn.Module):
    """A network of one step, once for each step."""

    def __init__(self, net: nn.Module, steps: int) -> None:
        super().__init__()
        self.net, self.steps = net, steps

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K)."""
        for module in self.modules():
            if isinstance(module, _Step):
                module.membrane = None
        return torch.stack([self.net(x) for _ in range(self.steps)]).mean(0)


class OnPath(nn.Module):
    """A network on compiled neurons."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K)."""
        with use_path("compiled"):
            return self.net(x)


def network(steps: int, *, small: bool) -> WideResNet:
    """Return our network."""
    torch.manual_seed(0)
    neuron = LIF(BETA, 1.0, "zero", detach_reset=True, surrogate=surrogates.Atan(ALPHA))
    return WideResNet(10 if small else 16, 1 if small else 4, time_steps=steps, neuron=neuron)


def replaced(net: nn.Module, make: Callable[[], Callable[[Tensor], Tensor]]) -> nn.Module:
    """Return a copy with other neurons."""
    net = copy.deepcopy(net)
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LIF):
                setattr(parent, name, Instead(make()))
    return net


def contestants(steps: int, *, small: bool) -> dict[str, nn.Module]:
    """Return the networks of all contestants, with equal weights."""
    net, one = network(steps, small=small), network(1, small=small)
    one.load_state_dict(net.state_dict())
    found = {
        STEP: Stepped(replaced(one, _Step), steps),
        FOLD: replaced(net, lambda: networks._Leaky(Mark(), BETA)),
        OURS: net,
        COMPILED: OnPath(copy.deepcopy(net)),
        FLOOR: replaced(net, lambda: lambda x: torch.relu(x.contiguous() if x.stride(0) == 0 else x)),
    }
    if importlib.util.find_spec("spikingjelly"):
        found[JELLY] = replaced(net, lambda: networks._LIFNode(BETA))
    return found


def check(nets: dict[str, nn.Module], x: Tensor, y: Tensor) -> dict[str, float]:
    """Refuse to time networks that are silent or not the same.

    Raises:
        RuntimeError: if they are not.
    """
    rates: list[float] = []
    hooks = [
        module.register_forward_hook(lambda _, __, out: rates.append(float(out.detach().mean())))
        for module in nets[OURS].modules() if isinstance(module, LIF)
    ]  # fmt: skip
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for who in (OURS, *(name for name in nets if name not in (OURS, FLOOR))):
        # Stepped over time, batch norms see other batches in training.
        net = copy.deepcopy(nets[who]).eval()
        point = x.clone().requires_grad_()
        z = net(point)
        found[who] = z.detach(), torch.autograd.grad(cross_entropy(z, y), point)[0]
    nets[OURS].eval()(x)
    nets[OURS].train()
    for hook in hooks:
        hook.remove()
    if not all(0.05 <= rate <= 0.5 for rate in rates):
        raise RuntimeError(f"every layer must fire in 5 to 50 % of its steps, got {rates}")
    z, g = found[OURS]
    apart = {}
    for who, (other, slope) in found.items():
        if not torch.allclose(other, z, rtol=0, atol=2e-5 * float(z.abs().max())):
            raise RuntimeError(f"{who} computes other logits than ours: {float((z - other).abs().max())} apart")
        apart[who] = float((slope - g).norm() / g.norm())
    if max(apart.values()) > 1e-3:
        raise RuntimeError(f"input gradients differ: {apart}")
    return apart


def step(net: nn.Module, x: Tensor, y: Tensor, kind: str, dtype: torch.dtype | None) -> Callable[[int], None]:
    """Return a training step."""
    optimiser = torch.optim.SGD(net.parameters(), lr=1e-5, momentum=0.9)

    def loss_of(point: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            z = net(point)
            if kind != "sparse gradient":
                return cross_entropy(z.float(), y)
            penalty = sparse_gradient_penalty(net, point, y, logits=z, step_size=0.01)
            return cross_entropy(z.float(), y) + 0.003 * penalty

    def run(_: int) -> None:
        net.train()
        point = x
        if kind == "adversarial":
            for _step in range(3):
                point = point.detach().requires_grad_()
                (g,) = torch.autograd.grad(loss_of(point), point)
                point = (x + (point.detach() + 0.01 * g.sign() - x).clamp(-0.03, 0.03)).clamp(0, 1)
        optimiser.zero_grad()
        loss_of(x.clone().requires_grad_() if kind == "sparse gradient" else point).backward()
        optimiser.step()

    return run


def measure(steps: int, batch: int, rounds: int, *, small: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Race the contestants."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(batch, 3, 32, 32, generator=generator), torch.randint(0, 10, (batch,), generator=generator)
    nets = contestants(steps, small=small)
    for module in nets[OURS].modules():  # running statistics of these inputs, so that all layers fire in evaluation too
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        nets[OURS].train()(x)
    for net in nets.values():
        for other, own in zip(_norms(net), _norms(nets[OURS]), strict=True):
            other.load_state_dict(own.state_dict())
            other.momentum = 0.1
    checked = check(nets, x, y)
    runs = {
        f"{kind} | {precision} | {who}": step(net, x, y, kind, None if precision == "fp32" else torch.bfloat16)
        for kind in KINDS for precision in ("fp32", "bf16") for who, net in nets.items()
    }  # fmt: skip
    for run in runs.values():
        run(0)
        run(0)
    seconds = race(runs, rounds, lambda *_: None)
    rows = []
    for key, spent in seconds.items():
        kind, precision, who = key.split(" | ")
        rows.append({
            "kind": kind, "precision": precision, "contestant": who, "seconds": spent,
            "speedup": ratios(seconds[f"{kind} | fp32 | {STEP}"], spent),
            "over_floor": ratios(spent, seconds[f"{kind} | {precision} | {FLOOR}"]),
        })  # fmt: skip
    return checked, rows


def _norms(net: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def table(results: dict[str, Any]) -> str:
    """Write the results as Markdown."""
    head = (
        f"{measured(results['provenance'])}. WRN-16-4, 32 x 32, direct coding, T = {results['steps']}, B = {results['batch']}; "
        f"{results['rounds']} rounds in turns; medians, quartiles in brackets; CPU time. Speed-up is over snnTorch stepped over "
        "time in fp32, time / floor against ReLU over all steps in the same precision. Adversarial: three gradients of the "
        "input, then a training step."
    )
    lines = [head, "", "| Step | Precision | Contestant | ms | Speed-up | Time / floor |", "|---|---|---|---|---|---|"]
    for row in results["rows"]:
        lines.append(
            f"| {row['kind']} | {row['precision']} | {row['contestant']} | {1000 * median(row['seconds']):.0f} | "
            f"{spread(row['speedup'])} | {spread(row['over_floor'])} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a small network, to try the benchmark itself")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    checked, rows = measure(args.steps, args.batch, args.rounds, small=args.small)
    results = {
        "provenance": provenance(["torch", "snntorch", "spikingjelly", "sg-lightning"]), "steps": args.steps,
        "batch": args.batch, "rounds": args.rounds, "checked": checked, "rows": rows,
    }  # fmt: skip
    save(results, table(results), args.out, "residual")
    print(table(results))


if __name__ == "__main__":
    main()
