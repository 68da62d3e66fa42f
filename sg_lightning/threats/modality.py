"""A threat on one modality of a dictionary input; the others stay clean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Self  # typing has it from Python 3.11

from sg_lightning.inputs import Input
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats.base import SingleThreat, Threat


@dataclass(frozen=True, init=False)
class Modality(Threat):
    """Attack one modality within its own threat. Its norm is called ``<modality>_<norm>``, e.g. ``audio_flips``.

    Args:
        modality: Key of the attacked modality.
        threat: What may be done to it.

    Raises:
        TypeError: if the threat is not one on a single tensor, or, at first use, if the input is no dictionary.
        ValueError: at first use, if the input lacks the modality.
    """

    norm: ClassVar[str] = "modality"
    modality: str = ""
    threat: SingleThreat | None = None

    def __init__(self, modality: str, threat: SingleThreat) -> None:
        if not isinstance(threat, SingleThreat):
            raise TypeError(f"Modality needs a threat on a single tensor, such as Linf('8/255'), got {threat!r}")
        super().__init__(threat.eps, threat.domain)
        object.__setattr__(self, "modality", modality)
        object.__setattr__(self, "threat", threat)
        for name in ("discrete", "shares", "relaxed"):
            object.__setattr__(self, name, getattr(threat, name))
        object.__setattr__(self, "norm", f"{modality}_{threat.norm}")

    def __post_init__(self) -> None:
        """The inner threat has checked its budget."""

    @property
    def _inner(self) -> SingleThreat:
        assert self.threat is not None
        return self.threat

    def part(self, x: Input) -> Tensor:
        """Return the attacked modality of an input."""
        if not isinstance(x, dict):
            raise TypeError(
                f"a threat on {self.modality!r} needs a dict of modalities; give a tensor its threat directly"
            )
        if self.modality not in x:
            raise ValueError(f"the input has the modalities {sorted(x)} but the threat is on {self.modality!r}")
        return x[self.modality]

    def _with(self, x: Input, part: Input) -> Input:
        assert isinstance(x, dict)
        assert isinstance(part, Tensor)
        return {**x, self.modality: part}

    def limits(self, x: Input) -> Tensor:
        """Return the budget of each sample, float64 (B,)."""
        return self._inner.limits(self.part(x))

    def check(self, x: Input) -> None:
        """Check the budget against the modality."""
        self._inner.check(self.part(x))

    def project(self, x_adv: Input, x: Input) -> Input:
        """Project the modality on its set; the others go back to clean."""
        return self._with(x, self._inner.project(self.part(x_adv), self.part(x)))

    def random_start(self, x: Input, generator: SampleGenerator) -> Input:
        """Start the modality at a random allowed point."""
        return self._with(x, self._inner.random_start(self.part(x), generator))

    def sample(self, x: Input, generator: SampleGenerator) -> Input:
        """Perturb the modality at random, at full budget."""
        return self._with(x, self._inner.sample(self.part(x), generator))

    def steepest_step(self, x_adv: Input, grad: Input, x: Input, step_size: float) -> Input:
        """Step in the modality."""
        slope = self.part(grad)
        return self._with(x_adv, self._inner.steepest_step(self.part(x_adv), slope, self.part(x), step_size))

    def maximise_linear(self, x: Input, grad: Input) -> Input:
        """Maximise in the modality."""
        return self._with(x, self._inner.maximise_linear(self.part(x), self.part(grad)))

    def size(self, x_adv: Input, x: Input) -> Tensor:
        """Return the size of the modality's perturbation, (B,)."""
        return self._inner.size(self.part(x_adv), self.part(x))

    def contains(self, x_adv: Input, x: Input) -> Tensor:
        """Check the modality's budget; the others must be untouched."""
        inside = self._inner.contains(self.part(x_adv), self.part(x))
        return inside & untouched(x_adv, x, {self.modality})

    def default_step(self, steps: int, done: int = 0) -> float:
        """Return the inner threat's length of a step."""
        return self._inner.default_step(steps, done)

    def with_eps(self, eps: float | str) -> Self:
        """Return the same threat with another budget."""
        return type(self)(self.modality, self._inner.with_eps(eps))

    def describe(self) -> dict[str, Any]:
        """Return plain data that identifies this threat."""
        return {**self._inner.describe(), "norm": self.norm, "modality": self.modality}


def untouched(x_adv: Input, x: Input, attacked: set[str]) -> Tensor:
    """Tell per sample, bool (B,), whether all modalities but the ``attacked`` ones are as they were."""
    assert isinstance(x, dict)
    assert isinstance(x_adv, dict)
    first = next(iter(x.values()))
    same = first.new_ones(len(first)).bool()
    for name in x.keys() - attacked:
        same = same & (x_adv[name] == x[name]).flatten(1).all(1)
    return same
