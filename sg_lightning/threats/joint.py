"""Several modalities of a dictionary input attacked at once, each within its share of a budget of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self  # typing has it from Python 3.11

from sg_lightning.inputs import Input
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats.base import Threat, is_share
from sg_lightning.threats.modality import Modality, untouched


@dataclass(frozen=True, init=False)
class Joint(Threat):
    """Attack several modalities at once, each within its own threat; modalities without one stay clean.

    ``eps`` is the share of each modality's budget that the attacker has: with 1/2, half of every budget (of budgets that
    count, the whole part of the half). Its size is the largest share of a modality's budget that is used.

    Args:
        threats: Threat of each modality by name.
        eps: Share of the budgets, a number or ratio from 0 to 1.
        name: What its norm is called; a suite may hold several joint threats.

    Raises:
        ValueError: if there is none, on a share out of range, or at first use if the input lacks a named modality.
    """

    norm: ClassVar[str] = "joint"
    threats: tuple[tuple[str, Threat], ...] = ()
    name: str = "joint"

    def __init__(
        self,
        threats: Mapping[str, Threat] | tuple[tuple[str, Threat], ...],
        eps: float | str = 1,
        name: str = "joint",
    ) -> None:
        super().__init__(eps)
        if self.budget > 1:
            raise ValueError(f"eps of Joint is a share of each modality's budget, at most 1, got {eps!r}")
        threats = dict(threats)
        if not threats:
            raise ValueError("Joint needs at least one modality, e.g. Joint({'image': Linf('8/255')})")
        for key, threat in threats.items():
            if not isinstance(threat, Threat) or isinstance(threat, Joint | Modality):
                raise TypeError(f"Joint needs a threat for {key!r}, got {threat!r}")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "norm", name)
        object.__setattr__(self, "threats", tuple(threats.items()))
        object.__setattr__(self, "discrete", any(threat.discrete for threat in threats.values()))
        if any(threat.relaxed for threat in threats.values()):
            object.__setattr__(self, "relaxed", True)
            object.__setattr__(self, "norm", f"relaxed_{name}")

    @property
    def parts(self) -> tuple[tuple[str, Threat], ...]:
        """The threat of each modality within its share of the budget."""
        return tuple((name, threat.with_eps(scaled(threat, self.eps))) for name, threat in self.threats)

    def with_eps(self, eps: float | str) -> Self:
        """Return the same threat with another share of the budgets."""
        return type(self)(self.threats, eps, self.name)

    def check(self, x: Input) -> None:
        """Check the budget of every modality."""
        modalities = self._modalities(x)
        for name, threat in self.parts:
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
        return {**clean, **{n: t.project(parts[n], clean[n]) for n, t in self.parts}}  # type: ignore[misc]

    def random_start(self, x: Input, generator: SampleGenerator) -> Input:
        """Start each modality at a random allowed point."""
        parts = self._modalities(x)
        return {**parts, **{n: t.random_start(parts[n], generator.fork(n)) for n, t in self.parts}}  # type: ignore[misc]

    def sample(self, x: Input, generator: SampleGenerator) -> Input:
        """Perturb each modality at random, each at its full budget."""
        parts = self._modalities(x)
        return {**parts, **{n: t.sample(parts[n], generator.fork(n)) for n, t in self.parts}}  # type: ignore[misc]

    def steepest_step(self, x_adv: Input, grad: Input, x: Input, step_size: float) -> Input:
        """Step in each modality; ``step_size`` is a share of each budget."""
        parts, slopes, clean = self._modalities(x_adv), self._modalities(grad), self._modalities(x)
        moved = {n: t.steepest_step(parts[n], slopes[n], clean[n], step_size * t.budget) for n, t in self.threats}
        return {**parts, **moved}  # type: ignore[dict-item]

    def maximise_linear(self, x: Input, grad: Input) -> Input:
        """Maximise in each modality; exact, as the sets are independent."""
        clean, slopes = self._modalities(x), self._modalities(grad)
        return {**clean, **{n: t.maximise_linear(clean[n], slopes[n]) for n, t in self.parts}}  # type: ignore[misc]

    def size(self, x_adv: Input, x: Input) -> Tensor:
        """Return the largest used share of a modality's whole budget, (B,); infinite if a budget of 0 is passed."""
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
        checks = [threat.contains(parts[name], clean[name]) for name, threat in self.parts]
        return torch.stack([*checks, untouched(parts, clean, {name for name, _ in self.threats})]).all(0)

    def includes(self, other: Threat) -> bool:
        """Tell whether all that a threat on one modality allows is allowed here."""
        part = dict(self.parts).get(other.modality) if isinstance(other, Modality) else None
        if part is None or is_share(part.eps) != is_share(other.eps) or other.budget > part.budget:
            return False
        return other == Modality(other.modality, part).with_eps(other.eps)  # type: ignore[attr-defined, arg-type]

    def describe(self) -> dict[str, Any]:
        """Return plain data that identifies this threat."""
        whole = {name: threat.describe() for name, threat in self.threats}
        return {"norm": self.norm, "eps": str(self.eps), "threats": whole}


def scaled(threat: Threat, share: float | str) -> float | str:
    """Return the share of a threat's budget, exactly; of whole numbers the whole part."""
    factor = Fraction(str(share))
    if factor == 1:
        return threat.eps
    if is_share(threat.eps):
        percent = Fraction(str(threat.eps).rstrip()[:-1]) * factor
        return f"{percent}%"
    budget = Fraction(str(threat.eps)) * factor
    # A threat that counts refuses fractions; whatever is whole already stays as it is.
    try:
        threat.with_eps(str(budget))
    except ValueError:
        return int(budget)
    return str(budget)
