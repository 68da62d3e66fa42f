"""What the adapters to foreign attack libraries share."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import random
import sys
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sg_lightning.attacks.adapters.shell import Shell
from sg_lightning.attacks.base import Attack, Progress
from sg_lightning.attacks.oracle import Oracle
from sg_lightning.attacks.search import value
from sg_lightning.inputs import Input, select
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import SingleThreat

Plain = str | int | float | bool | None


@dataclass(frozen=True)
class ForeignAttack(Attack):
    """Base of the adapters: run a library's attack on a shell of the model and trust nothing that comes back.

    The library sees inputs in [0, 1] (budgets are scaled to match) of shape (B, C, H, W), as contiguous float32, and a
    module without weights. What it returns is projected onto the threat and evaluated again by our oracle: NaN, a
    point outside the budget or a success that the model does not confirm never counts. Random states, ``sys.settrace``
    and the model are as before.

    Unlike in our own attacks, noise belongs to the call: results depend on batch size and order. Gradient estimators
    start with an empty memory at every query, and EOT averages the gradients at the mean logits.

    Args:
        threat: A threat on one tensor in a box with two walls.
        settings: Arguments of the library's class, plain data. Those that follow from threat and model are not allowed;
            step sizes default to 2.5 eps / steps as in our own attacks, where the library's are absolute numbers.

    Raises:
        ValueError: on a threat or algorithm that the library does not serve, or a setting that it does not know.
        ImportError: if the library is not installed.
    """

    settings: Mapping[str, Any] = field(default_factory=dict, kw_only=True, hash=False)
    package: ClassVar[str]
    command: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        if not isinstance(self.threat, SingleThreat):
            raise TypeError(f"{owner} attacks a single tensor, but {type(self.threat).__name__} is a threat on several")
        domain = self.threat.domain
        if domain.lattice is not None or not np.isfinite([domain.low, domain.high]).all():
            raise ValueError(
                f"{owner} moves values freely between two walls, but the domain is {domain}: use PGD or L0 attacks of "
                "sg_lightning, which respect integers and open domains"
            )
        if not isinstance(self.settings, Mapping) or not all(map(_is_plain, self.settings.values())):
            raise ValueError(f"settings must map names to plain values, got {self.settings!r}")
        object.__setattr__(self, "settings", dict(self.settings))

    @property
    @abstractmethod
    def algorithms(self) -> tuple[str, ...]:
        """What to run, one after the other, each on the samples that still stand."""

    @abstractmethod
    def _perturb(self, algorithm: str, shell: Shell, y: Tensor, eps: float, seed: int) -> Tensor:
        """Return the library's adversarial points for ``shell.unit``.

        Args:
            algorithm: One of :attr:`algorithms`.
            shell: The model and its inputs.
            y: Labels (B,).
            eps: Budget in the library's units.
            seed: For libraries that seed themselves.
        """

    @property
    def title(self) -> str:
        """Library, algorithms and settings, e.g. ``foolbox:DDNAttack(steps=50)``."""
        told = ",".join(f"{key}={value}" for key, value in self.settings.items())
        return f"{self.kind}:{'+'.join(self.algorithms)}" + (f"({told})" if told else "")

    def describe(self) -> dict[str, Any]:
        """Return plain data that identifies the attack, the library's version included."""
        return {**super().describe(), "version": importlib.metadata.version(self.package)}

    def _search(
        self, oracle: Oracle, x: Input, y: Tensor, noise: SampleGenerator, progress: Progress, early_drop: bool
    ) -> None:
        assert isinstance(x, Tensor)  # the threat is on one tensor
        everyone = torch.arange(len(y), device=y.device)
        loss, wrong = value(oracle, x, y, "ce")
        progress.record(everyone, x, loss, wrong, 0, 1)
        if self.threat.budget == 0:
            return
        for algorithm in self.algorithms:
            index = everyone[progress.open(everyone)] if early_drop else everyone
            for part in index.split(oracle.batch_size or len(y)):
                if len(part):
                    self._attack(algorithm, oracle, x, y, part, noise.select(part).fork(algorithm), progress)

    def _attack(
        self,
        algorithm: str,
        oracle: Oracle,
        x: Tensor,
        y: Tensor,
        index: Tensor,
        noise: SampleGenerator,
        progress: Progress,
    ) -> None:
        clean, y = select(x, index), y[index]
        shell = Shell(oracle, self.threat.domain, clean, index)  # type: ignore[arg-type]
        eps = self.threat.budget if self.threat.norm == "l0" else self.threat.budget / self.threat.domain.width
        seed = int(noise.keys.sum()) % 2**31
        with _undisturbed(self.package, seed):
            unit = self._perturb(algorithm, shell, y, eps, seed)
        point = self.threat.project(shell.found(unit.detach().float()), clean)
        loss, wrong = value(oracle, point, y, "ce", index)
        steps = int(shell.gradients.max()) or -(-shell.forwards // len(index))
        done = int(progress.iterations[index].max())
        queries = -(-shell.forwards // len(index)) + 1
        open_ = progress.open(index)
        progress.record(index, point, loss, wrong & self.threat.contains(point, clean), done + steps, queries)
        progress.gradients[index[open_]] += shell.gradients[open_]
        progress.zero_gradients[index[open_]] += shell.zero[open_]
        progress.invalid[index] |= shell.invalid & ~progress.success[index]

    def _arguments(self, build: Any, fixed: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Choose what a class of the library takes: ``defaults``, then the user's settings, then ``fixed``."""
        known = _parameters(build)
        return {k: v for k, v in {**defaults, **self.settings, **fixed}.items() if k in known}

    def _check_settings(self, builds: list[Any], fixed: set[str]) -> None:
        """Raise ``ValueError`` on settings that no class of the library takes or that the adapter gives."""
        known = {name for build in builds for name in _parameters(build)} - fixed
        strange = set(self.settings) - known
        if strange:
            raise ValueError(
                f"{self.kind}:{'+'.join(self.algorithms)} has no setting {sorted(strange)}; known: "
                f"{', '.join(sorted(known)) or 'none'} (model, budget, norm, domain and labels are given by the adapter)"
            )
        missing = {
            name
            for build in builds
            for name, parameter in _parameters(build).items()
            if parameter.default is parameter.empty and name not in fixed and parameter.kind != parameter.VAR_KEYWORD
        } - set(self.settings)
        if missing:
            raise ValueError(f"{self.kind}:{'+'.join(self.algorithms)} needs the settings {sorted(missing)}")


@dataclass(frozen=True)
class OneClass(ForeignAttack):
    """Base of the adapters that run one class of a library, named ``algorithm``."""

    algorithm: str

    @property
    def algorithms(self) -> tuple[str, ...]:
        """The one class."""
        return (self.algorithm,)


def library(name: str, command: str) -> ModuleType:
    """Import a library, or say in one sentence how to get it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs, about Python and numpy
            return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"This adapter needs {name.split('.')[0]}: {command}") from error


def choose(owner: ForeignAttack, algorithm: str, norms: Mapping[str, str], refused: Mapping[str, str]) -> None:
    """Raise ``ValueError`` unless ``algorithm`` is sound and made for the norm of the threat.

    Args:
        owner: The adapter.
        algorithm: Name of a class.
        norms: Its norms by the name of the class, separated by blanks.
        refused: Reasons by the name of the class.
    """
    norm = owner.threat.norm
    if algorithm in refused:
        raise ValueError(f"{owner.kind}'s {algorithm} is refused: {refused[algorithm]}")
    fitting = sorted(name for name, served in norms.items() if norm in served.split())
    if algorithm not in fitting:
        fault = f"is made for {norms[algorithm]}" if algorithm in norms else "is unknown"
        raise ValueError(
            f"{owner.kind}'s {algorithm!r} {fault}; for {norm} choose one of: {', '.join(fitting) or 'none'}"
        )


def step_size(build: Any, settings: Mapping[str, Any], eps: float) -> float | None:
    """Return 2.5 eps / steps if the class takes a number of steps."""
    known = _parameters(build)
    steps = next((name for name in ("steps", "nb_iter") if name in known), None)
    return None if steps is None else 2.5 * eps / settings.get(steps, known[steps].default)


def _parameters(build: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(build).parameters


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, Plain)


@contextmanager
def _undisturbed(package: str, seed: int) -> Iterator[None]:
    """Seed every random state for a library, and put them and the tracer back: torch's are the oracle's to restore."""
    tracer, python, numpy = sys.gettrace(), random.getstate(), np.random.get_state()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    try:
        with warnings.catch_warnings():
            # Deprecations that are not ours to fix; what the model warns of still shows.
            warnings.filterwarnings("ignore", module=rf"{package}|scipy|torch\.optim")
            yield
    finally:
        sys.settrace(tracer)
        random.setstate(python)
        np.random.set_state(numpy)
