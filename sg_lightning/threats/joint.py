"""One threat per modality of a dictionary input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sg_lightning.inputs import Input
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats.base import Threat


@dataclass(frozen=True, init=False)
class Joint(Threat):
    """Attack several modalities at once, each within its own threat; modalities without one stay clean.

    Its own eps is 1 and its size the largest share of a modality's budget that is used.

    Args:
        threats: Threat of each modality by name.

    Raises:
        ValueError: if there is none, or at first use if the input lacks a named modality.
    """

    norm: ClassVar[str] = "joint"
    threats: tuple[tuple[str, Threat], ...] = ()

    def __init__(self, threats: Mapping[str, Threat] | tuple[tuple[str, Threat], ...]) -> None:
        super().__init__(eps=1)
        threats = dict(threats)
        if not threats:
            raise ValueError("Joint needs at least one modality, e.g. Joint({'image': Linf('8/255')})")
        for name, threat in threats.items():
            if not isinstance(threat, Threat) or isinstance(threat, Joint):
                raise TypeError(f"Joint needs a threat for {name!r}, got {threat!r}")
        object.__setattr__(self, "threats", tuple(threats.items()))
        object.__setattr__(self, "discrete", any(threat.discrete for threat in threats.values()))
        if any(threat.relaxed for threat in threats.values()):
            object.__setattr__(self, "relaxed", True)
            object.__setattr__(self, "norm", "relaxed_joint")

    @property
    def key(self) -> str:
        """Metric-safe name built from those of the modalities."""
        return f"{self.norm}_" + "_".join(f"{name}_{threat.key}" for name, threat in self.threats)

    def check(self, x: Input) -> None:
        """Check the budget of every modality."""
        modalities = self._modalities(x)
        for name, threat in self.threats:
            threat.check(modalities[name])

    def _modalities(self, x: Input) -> dict[str, Tensor]:
        if not isinstance(x, dict):
            raise TypeError("a Joint threat needs a dict of modalities; give a single tensor its threat directly")
        missing = [name for name, _ in self.threats if name not in x]
        if missing:
            raise ValueError(f"the input has the modalities {sorted(x)} but the threat also names {missing}")
        return x

    def project(self, x_adv: Input, x: Input) -> Input:
        """Project each modality on its own set; those without a threat go back to clean."""
        parts, clean = self._modalities(x_adv), self._modalities(x)
        return {**clean, **{n: t.project(parts[n], clean[n]) for n, t in self.threats}}  # type: ignore[misc]

    def random_start(self, x: Input, generator: SampleGenerator) -> Input:
        """Start each modality at a random allowed point."""
        parts = self._modalities(x)
        return {**parts, **{n: t.random_start(parts[n], generator.fork(n)) for n, t in self.threats}}  # type: ignore[misc]

    def sample(self, x: Input, generator: SampleGenerator) -> Input:
        """Perturb each modality at random, each at its full budget."""
        parts = self._modalities(x)
        return {**parts, **{n: t.sample(parts[n], generator.fork(n)) for n, t in self.threats}}  # type: ignore[misc]

    def steepest_step(self, x_adv: Input, grad: Input, x: Input, step_size: float) -> Input:
        """Step in each modality; ``step_size`` is a share of each budget."""
        parts, slopes, clean = self._modalities(x_adv), self._modalities(grad), self._modalities(x)
        moved = {n: t.steepest_step(parts[n], slopes[n], clean[n], step_size * t.budget) for n, t in self.threats}
        return {**parts, **moved}  # type: ignore[dict-item]

    def maximise_linear(self, x: Input, grad: Input) -> Input:
        """Maximise in each modality; exact, as the sets are independent."""
        clean, slopes = self._modalities(x), self._modalities(grad)
        return {**clean, **{n: t.maximise_linear(clean[n], slopes[n]) for n, t in self.threats}}  # type: ignore[misc]

    def size(self, x_adv: Input, x: Input) -> Tensor:
        """Return the largest used share of a modality's budget, (B,); infinite if a budget of 0 is passed."""
        parts, clean = self._modalities(x_adv), self._modalities(x)
        shares = []
        for name, threat in self.threats:
            size = threat.size(parts[name], clean[name])
            limit = threat.limits(clean[name])
            shares.append(torch.where(limit > 0, size / limit, torch.where(size > 0, torch.inf, 0.0)))
        return torch.stack(shares).amax(0)

    def contains(self, x_adv: Input, x: Input) -> Tensor:
        """Check every modality; those without a threat must be untouched."""
        parts, clean = self._modalities(x_adv), self._modalities(x)
        checks = [threat.contains(parts[name], clean[name]) for name, threat in self.threats]
        named = {name for name, _ in self.threats}
        checks += [(parts[name] == clean[name]).flatten(1).all(1) for name in clean if name not in named]
        return torch.stack(checks).all(0)

    def describe(self) -> dict[str, Any]:
        """Return plain data that identifies this threat."""
        return {"norm": self.norm, "threats": {name: threat.describe() for name, threat in self.threats}}
