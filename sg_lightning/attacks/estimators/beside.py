"""Several estimators in one pass through a model, each for samples of its own."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sg_lightning.attacks.estimators.base import Estimator, Memory, SingleEstimator, in_force
from sg_lightning.neurons import BackwardRule, SlopeRule, SpikingNeuron, Surrogate, Trace
from sg_lightning.neurons.rules import Pullback

Rule = Surrogate | BackwardRule | None


@dataclass(frozen=True)
class Each:
    """Tells the samples of a batch apart by their estimator: sample ``i`` of it has ``estimators[i // size]``.

    Args:
        estimators: Estimators of as many backward passes each, none of which looks at more than a sample.
        size: Samples of each.
    """

    estimators: tuple[Estimator, ...]
    size: int

    @property
    def parts(self) -> tuple[SingleEstimator, ...]:
        """Those of the first: as many as each has."""
        return self.estimators[0].parts

    @property
    def per_sample(self) -> bool:
        """Whether the gradient of a sample depends on nothing but the sample."""
        return True

    def refusal(self, model: object) -> str | None:
        """Say nothing: each has been asked before."""
        return None


@dataclass(frozen=True)
class Share:
    """A backward pass for some samples of a batch.

    Attributes:
        estimator: Gives the gradient; ``None``: the training surrogate.
        index: Places of the samples, int64 (n,); ``None``: all, in order.
        number: Which of the estimators side by side it belongs to.
    """

    estimator: SingleEstimator | None
    index: Tensor | None = None
    number: int = 0

    def memory(self, whole: Memory) -> Memory:
        """Return what the estimator knows of its samples; of all samples the memory itself."""
        if self.index is None:
            return whole
        own = Memory()
        for key, value in whole.values.items():
            assert isinstance(key, tuple)
            if key[0] == self.number:
                own.values[key[1]] = value[self.index]
        own.frozen = whole.frozen
        return own

    def remember(self, whole: Memory, own: Memory, given: dict[Hashable, Tensor], samples: int) -> None:
        """Write what was gathered beyond what was ``given`` back into the memory of all ``samples``."""
        if self.index is None:
            return
        for key, value in own.values.items():
            if value is given.get(key):  # of another part of the same estimator
                continue
            place = (self.number, key)
            held = whole.values.get(place)
            fresh = value.new_zeros((samples, *value.shape[1:])) if held is None else held.clone()
            fresh[self.index] = value
            whole.values[place] = fresh


def shares(estimator: Estimator | Each | None, rows: Tensor | None, samples: int, device: torch.device) -> list[Share]:
    """Return the backward passes of a batch.

    Args:
        estimator: The estimator, or several side by side.
        rows: Which samples of the attacked batch these are, int64 (B,); ``None``: all, in order.
        samples: Their number B.
        device: Where they are.
    """
    if estimator is None:
        return [Share(None)]
    if isinstance(estimator, Estimator):
        return [Share(part) for part in estimator.parts]
    if rows is None and samples != estimator.size * len(estimator.estimators):
        raise OtherSamples  # an attack that does not say which samples are left
    group = (torch.arange(samples, device=device) if rows is None else rows) // estimator.size
    found = []
    for number, single in enumerate(estimator.estimators):
        index = (group == number).nonzero().squeeze(1)
        if len(index):
            found += [Share(part, index, number) for part in single.parts]
    return found


def applied(model: object, parts: Sequence[tuple[SingleEstimator | None, Memory, int]]) -> AbstractContextManager[None]:
    """Put estimators in force side by side: the first for the first samples of a batch, and so on.

    Args:
        model: The model.
        parts: Of each estimator itself, what it knows, and its number of samples.
    """
    rules: list[Rule] = [None if estimator is None else estimator.rule(memory) for estimator, memory, _ in parts]
    if len(rules) == 1 or all(rule is None for rule in rules):
        return in_force(rules[0], model)
    sizes = [size for _, _, size in parts]
    slopes = all(rule is None or isinstance(rule, Surrogate | SlopeRule) for rule in rules)
    return in_force((SlopesBeside if slopes else RulesBeside)(rules, sizes), model)


def can_be_beside(model: object) -> bool:
    """Whether every neuron of the model has a surrogate of its own to return to."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return all(m.surrogate is not None for m in modules if isinstance(m, SpikingNeuron))


class OtherSamples(Exception):
    """A neuron sees another number of samples than the model was given, as with crops of each: nobody knows whose."""


def _check(samples: int, sizes: Sequence[int]) -> None:
    if samples != sum(sizes):
        raise OtherSamples


class RulesBeside(BackwardRule):
    """Rules of samples side by side.

    Args:
        rules: The rules; ``None`` is the surrogate of the neuron.
        sizes: Number of samples of each.
    """

    def __init__(self, rules: Sequence[Rule], sizes: Sequence[int]) -> None:
        self.rules, self.sizes = rules, list(sizes)

    def pullback(self, trace: Trace) -> Pullback:
        """Let each rule look at its samples and pull their gradients back."""
        _check(trace.currents.shape[1], self.sizes)
        pulls = []
        parts = zip(trace.currents.split(self.sizes, 1), trace.membranes.split(self.sizes, 1), strict=True)
        for rule, (currents, membranes) in zip(self.rules, parts, strict=True):
            own = rule if isinstance(rule, BackwardRule) else SlopesBeside([rule], [membranes.shape[1]])
            part = Trace(trace.neuron, currents, membranes, trace.beta, trace.threshold, trace.dynamics)
            pulls.append(own.pullback(part))

        def pull(grad: Tensor) -> Tensor:
            found = torch.empty_like(trace.membranes)  # in their memory layout
            for own, out, g in zip(pulls, found.split(self.sizes, 1), grad.split(self.sizes, 1), strict=True):
                out.copy_(own(g))
            return found

        return pull


class SlopesBeside(SlopeRule):
    """Rules of samples side by side that give slopes only, which every neuron can follow."""

    def __init__(self, rules: Sequence[Rule], sizes: Sequence[int]) -> None:
        self.rules, self.sizes = rules, list(sizes)

    def slope(self, neuron: nn.Module, z: Tensor, past: Sequence[Tensor]) -> Tensor:
        """Return the slopes of one time step."""
        _check(len(z), self.sizes)
        pasts = list(zip(*(p.split(self.sizes) for p in past), strict=True)) if past else [()] * len(self.sizes)
        found = torch.empty_like(z)
        for rule, part, before, out in zip(
            self.rules, z.split(self.sizes), pasts, found.split(self.sizes), strict=True
        ):
            out.copy_(rule.slope(neuron, part, before) if isinstance(rule, SlopeRule) else _own(rule, neuron, part))
        return found

    def slopes(self, neuron: nn.Module, z: Tensor) -> Tensor:
        """Return the slopes of all time steps."""
        _check(z.shape[1], self.sizes)
        found = torch.empty_like(z)
        for rule, part, out in zip(self.rules, z.split(self.sizes, 1), found.split(self.sizes, 1), strict=True):
            out.copy_(rule.slopes(neuron, part) if isinstance(rule, SlopeRule) else _own(rule, neuron, part))
        return found


def _own(rule: Rule, neuron: nn.Module, z: Tensor) -> Tensor:
    surrogate = rule if isinstance(rule, Surrogate) else neuron.surrogate
    assert isinstance(surrogate, Surrogate)
    return surrogate.derivative(z)
