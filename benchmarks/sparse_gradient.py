"""A step of sparse-gradient training: ours against the arithmetic of the official code written in its style.

    python benchmarks/sparse_gradient.py

You will see: CPU time of one training step with the sparse-gradient penalty (two forward passes, the direction from an
input gradient, one backward pass through both, SGD with momentum) on VGG-11 with two hidden layers of 4096, T = 8, B = 16.
The base steps each neuron over time in Python and makes the probabilities sample by sample, as the official code of
arXiv 2405.20355 does (it is written anew here). Both are first compared in float64: losses and all gradients agree.
Results go to benchmarks/results (sparse_gradient.json, sparse_gradient.md).
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from timing import measured, provenance, race, ratios, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import spread

from sg_lightning.backbones import VGG
from sg_lightning.neurons import LIF, paths, surrogates, use_path
from sg_lightning.objectives import sparse_gradient_penalty

ROOT = Path(__file__).parent.parent
WEIGHT, STEP = 0.003, 0.01
BASE = "in the style of the official code, fp32"


class _Spike(torch.autograd.Function):
    """A spike at or above 0, with a triangular surrogate of width 1."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return upstream * (1 - u.abs()).clamp_min(0)


class _Stepped(nn.Module):
    """Integrate and fire in a loop over the steps; the reset to zero is attached."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(self.steps, -1, *x.shape[1:])
        membrane, spikes = 0, []
        for step in range(self.steps):
            membrane = membrane + x[step]
            spike = _Spike.apply(membrane - 1.0)
            membrane = (1 - spike) * membrane
            spikes.append(spike)
        return torch.stack(spikes).flatten(0, 1)


class OfficialStyle(nn.Module):
    """The same network: the image repeated T times, all layers on (T B, ...), neurons stepped."""

    def __init__(self, net: VGG) -> None:
        super().__init__()
        layers = [
            _Stepped(net.time_steps) if isinstance(layer, LIF) else copy.deepcopy(layer) for layer in net.features
        ]
        self.layers = nn.Sequential(*layers, copy.deepcopy(net.head))
        self.steps = net.time_steps

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K)."""
        repeated = x.unsqueeze(0).repeat(self.steps, 1, 1, 1, 1).flatten(0, 1)
        return self.layers(repeated).view(self.steps, len(x), -1).mean(0)


def official_loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss with the penalty, probabilities made sample by sample."""
    x = x.clone().requires_grad_()
    z = net(x)
    rivals, first = [], []
    for b in range(len(y)):
        wrong = [(float(z[b, k]), k) for k in range(z.shape[1]) if k != int(y[b])]
        rivals.append(max(wrong)[1])
        first.append(torch.exp(z[b, y[b]]) / (torch.exp(z[b, y[b]]) + torch.exp(z[b, rivals[b]])))
    f1 = torch.stack(first)
    (g,) = torch.autograd.grad(f1.sum(), x, retain_graph=True)
    z2 = net(x.detach() + STEP * g.sign().detach())
    second = [torch.exp(z2[b, y[b]]) / (torch.exp(z2[b, y[b]]) + torch.exp(z2[b, rivals[b]])) for b in range(len(y))]
    penalty = ((torch.stack(second) - f1) / STEP).square().mean()
    return cross_entropy(z, y) + WEIGHT * penalty


def our_loss(net: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the same loss by our objective."""
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        z = net(x)
        penalty = sparse_gradient_penalty(net, x, y, logits=z, step_size=STEP)
        return cross_entropy(z.float() if dtype else z, y) + WEIGHT * penalty


def build(steps: int, *, spiking: bool = True) -> VGG:
    """Return VGG-11 as in the official code, its linear layers scaled so that their neurons fire."""
    torch.manual_seed(0)
    neuron = LIF(1.0, 1.0, "zero", fire_at_threshold=True, surrogate=surrogates.Triangular(1.0))
    return VGG("vgg11", time_steps=steps, neuron=neuron, spiking=spiking)


class Repeated(nn.Module):
    """The floor: the network with ReLU, which does the work of all T steps."""

    def __init__(self, net: VGG, steps: int) -> None:
        super().__init__()
        self.net, self.steps = net, steps

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K); the first layer sees one step, as in ours."""
        convolution, norm, *rest = self.net.features
        once = norm(convolution(x))
        active = once.unsqueeze(0).expand(self.steps, *once.shape).flatten(0, 1)
        for layer in rest:
            active = layer(active)
        return self.net.head(active.unflatten(0, (self.steps, len(x))).mean(0))


def check() -> dict[str, float]:
    """Compare losses and gradients in float64.

    Raises:
        RuntimeError: if they differ, or a layer is silent.
    """
    ours = build(4).double().train()
    theirs = OfficialStyle(ours).double().train()
    x, y = torch.rand(2, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 7])
    rates: list[float] = []
    neurons = [module for module in ours.modules() if isinstance(module, LIF)]
    hooks = [
        neuron.register_forward_hook(lambda _, __, out: rates.append(float(out.detach().mean()))) for neuron in neurons
    ]
    losses = our_loss(ours, x, y), official_loss(theirs, x, y)
    for hook in hooks:
        hook.remove()
    if not all(0.02 <= rate <= 0.6 for rate in rates):
        raise RuntimeError(f"a layer is silent or saturated: {rates}")
    grads = [
        torch.autograd.grad(loss, list(net.parameters())) for loss, net in zip(losses, (ours, theirs), strict=True)
    ]
    largest = max(float(g.abs().max()) for g in grads[0])
    apart = max(float((a - b).abs().max()) for a, b in zip(*grads, strict=True)) / largest
    if abs(float((losses[0] - losses[1]).detach())) > 1e-10 or apart > 1e-9:
        raise RuntimeError(
            f"not the same step: losses {[float(loss.detach()) for loss in losses]}, gradients {apart} apart"
        )
    return {"loss": float(losses[0].detach()), "gradients_relative_to_largest": apart, "least_firing": min(rates)}


def measure(
    steps: int, batch: int, rounds: int, device: str = "cpu", clock: Callable[[], float] = time.process_time
) -> dict[str, Any]:
    """Race the ways to take the step."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(batch, 3, 32, 32, generator=generator), torch.randint(0, 10, (batch,), generator=generator)
    x, y, net = x.to(device), y.to(device), build(steps).to(device)
    floor = Repeated(build(steps, spiking=False), steps).to(device)

    def step(model: nn.Module, loss: Callable[[nn.Module], Tensor], path: paths.Path = "auto") -> Callable[[int], None]:
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)

        def run(_: int) -> None:
            optimiser.zero_grad()
            with use_path(path):
                value = loss(model.train())
            value.backward()
            optimiser.step()

        return run

    runs = {
        BASE: step(OfficialStyle(net), lambda model: official_loss(model, x, y)),
        "ours, fp32": step(copy.deepcopy(net), lambda model: our_loss(model, x, y)),
        "ours, bf16": step(copy.deepcopy(net), lambda model: our_loss(model, x, y, torch.bfloat16)),
        # Which a run takes by itself only when it has been long enough.
        "ours, compiled, fp32": step(copy.deepcopy(net), lambda model: our_loss(model, x, y), "compiled"),
        "ours, compiled, bf16": step(
            copy.deepcopy(net), lambda model: our_loss(model, x, y, torch.bfloat16), "compiled"
        ),
        "ReLU (floor), fp32": step(floor, lambda model: our_loss(model, x, y)),
        "ReLU (floor), bf16": step(copy.deepcopy(floor), lambda model: our_loss(model, x, y, torch.bfloat16)),
    }
    if device != "cpu" or not paths.has_compiler():
        runs = {name: run for name, run in runs.items() if "compiled" not in name}
    for run in [*runs.values()] * 2:
        run(0)
    seconds = race(runs, rounds, lambda *_: None, clock=clock)
    return {
        name: {
            "seconds": spent, "speedup": ratios(seconds[BASE], spent),
            "over_floor": ratios(spent, seconds[f"ReLU (floor), {'bf16' if 'bf16' in name else 'fp32'}"]),
        }
        for name, spent in seconds.items()
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """Write the results as Markdown."""
    head = (
        f"{measured(results['provenance'])}. VGG-11, T = {results['steps']}, B = {results['batch']}; {results['rounds']} "
        "rounds in turns; medians, quartiles in brackets; CPU time."
    )
    lines = [
        head,
        "",
        "| Step | Seconds | Speed-up | Time / floor |",
        "|---|---|---|---|",
    ]
    for name, row in results["ways"].items():
        lines.append(
            f"| {name} | {median(row['seconds']):.2f} | {spread(row['speedup'])} | {spread(row['over_floor'])} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = {
        "provenance": provenance(["torch", "sg-lightning"]), "steps": args.steps, "batch": args.batch,
        "rounds": args.rounds, "checked": check(), "ways": measure(args.steps, args.batch, args.rounds),
    }  # fmt: skip
    save(results, table(results), args.out, "sparse_gradient")
    print(table(results))


if __name__ == "__main__":
    main()
