"""What a gradient estimator is: a stand-in for the surrogate gradient while an attack runs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sg_lightning.neurons import BackwardRule, SlopeRule, SpikingNeuron, Surrogate
from sg_lightning.recipes import Storable


class Memory:
    """What an estimator has gathered about each sample along one trajectory of an attack.

    Attributes:
        values: Tensors (B, ...) by key.
        frozen: Whether the values must stay as they are, as in all draws but the first of an averaged gradient.
    """

    def __init__(self, values: dict[Hashable, Tensor] | None = None) -> None:
        self.values = {} if values is None else values
        self.frozen = False

    def select(self, index: Tensor) -> Memory:
        """Return the memory of the samples ``index`` (int64 or bool mask)."""
        return Memory({key: value[index] for key, value in self.values.items()})

    def put(self, parts: list[Memory], sizes: list[int]) -> None:
        """Take over what was gathered in chunks of the batch, of so many samples; zeros where a chunk has nothing."""
        if len(parts) == 1:
            self.values = parts[0].values
            return
        known = {key: value for part in parts for key, value in part.values.items()}
        self.values = {
            key: torch.cat([
                part.values[key] if key in part.values else like.new_zeros((size, *like.shape[1:]))
                for part, size in zip(parts, sizes, strict=True)
            ])
            for key, like in known.items()
        }  # fmt: skip


@Storable.register
@dataclass(frozen=True)
class Estimator(ABC):
    """Base of all gradient estimators. Immutable; the forward pass and training are never touched."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def parts(self) -> tuple[SingleEstimator, ...]:
        """The estimators whose gradients are averaged."""

    @property
    def per_sample(self) -> bool:
        """Whether the gradient of a sample depends on nothing but the sample; else attacks drop no sample early."""
        return True

    @property
    def label(self) -> str:
        """Short name for rows and tables: the name, and the settings that are not the default."""
        changed = [value for f in fields(self) if (value := getattr(self, f.name)) != f.default]
        return "-".join([self.name, *(f"{value:g}" if isinstance(value, float) else str(value) for value in changed)])

    def refusal(self, model: object) -> str | None:
        """Say why this estimator cannot be used on a model, or ``None``."""
        neurons = [m for m in model.modules() if isinstance(m, SpikingNeuron)] if isinstance(model, nn.Module) else []
        rules = [rule for part in self.parts if (rule := part.rule(Memory())) is not None]
        if rules and not neurons:
            return (
                f"the estimator {self} replaces surrogate gradients, but {type(model).__name__} has no spiking neuron of "
                "sg_lightning: wrap snnTorch networks with from_snntorch(...), and leave estimator=None for other models"
            )
        tied = [type(neuron).__name__ for neuron in neurons if neuron.slopes_only]
        if tied and not all(isinstance(rule, Surrogate | SlopeRule) for rule in rules):
            return (
                f"the estimator {self} replaces the whole backward pass of a neuron, but {tied[0]} can only follow new "
                "slopes; use BPTT, PDSG or ASSG"
            )
        return None

    def describe(self) -> dict[str, Any]:
        """Return plain data that identifies the estimator (for hashes and tables)."""
        return {"name": self.name, **asdict(self)}

    def _check(self, name: str, low: float, high: float = math.inf, *, above: bool = False) -> None:
        """Make the setting a float in [low, high), with ``above`` in (low, high), or raise ``ValueError``."""
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value < high or (above and value == low):
            least = f"above {low:g}" if above else f"{low:g} or more"
            raise ValueError(f"{self.name}: {name} must be a number {least} and below {high:g}, got {value!r}")
        object.__setattr__(self, name, float(value))


@dataclass(frozen=True)
class SingleEstimator(Estimator):
    """Base of the estimators that take one backward pass."""

    @abstractmethod
    def rule(self, memory: Memory) -> Surrogate | BackwardRule | None:
        """Return what the neurons use in the next pass, forward and back; ``None``: their training surrogate."""

    @property
    def parts(self) -> tuple[SingleEstimator, ...]:
        """Itself."""
        return (self,)

    def applied(self, model: object, memory: Memory) -> AbstractContextManager[None]:
        """Put the rule in force inside the block."""
        return in_force(self.rule(memory), model)


@contextmanager
def in_force(rule: Surrogate | BackwardRule | None, model: object) -> Iterator[None]:
    """Let a rule replace the surrogates of all neurons of a model inside the block; ``None``: nothing."""
    found = model.modules() if rule is not None and isinstance(model, nn.Module) else ()
    neurons = [m for m in found if isinstance(m, SpikingNeuron)]
    before = [neuron.attack_rule for neuron in neurons]
    try:
        for neuron in neurons:
            neuron.attack_rule = rule
        yield
    finally:
        for neuron, held in zip(neurons, before, strict=True):
            neuron.attack_rule = held
