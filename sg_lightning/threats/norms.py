"""L-infinity, L2 and L1 balls inside a box."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats.base import SingleThreat
from sg_lightning.threats.geometry import add_towards_zero, fill_l1, fill_l2, project_l1

_TINY = 1e-300


@dataclass(frozen=True)
class _Ball(SingleThreat):
    """What the norm balls share; subclasses give the arithmetic on magnitudes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.domain.lattice is not None:
            raise ValueError(
                f"{type(self).__name__} moves values by any amount, but the domain {self.domain} has integers only: use "
                f"EventFlips, SpikeRetiming or L0; Relaxed{type(self).__name__} (norm 'relaxed_{self.norm}') measures it "
                "with values that no sensor can produce, and says so"
            )

    def check(self, x: Tensor) -> None:  # type: ignore[override]
        """Raise ``ValueError`` if no two points of the domain are that far apart."""
        values = x[0].numel()
        largest = self.domain.width * self._diameter(values)
        if self.budget > largest:
            raise ValueError(
                f"eps={self.eps} of {type(self).__name__} is larger than the domain: inputs of {values} values in "
                f"{self.domain} are at most {largest:.4g} apart; write eps in input units"
            )

    @abstractmethod
    def _diameter(self, values: int) -> float:
        """Return the distance between opposite corners of a unit cube of so many values."""

    @abstractmethod
    def _shrink(self, magnitude: Tensor, room: Tensor, eps: float | Tensor) -> Tensor:
        """Project magnitudes (B, n) with ``room <= magnitude``."""

    @abstractmethod
    def _fill(self, gain: Tensor, room: Tensor) -> Tensor:
        """Maximise ``<gain, d>`` over magnitudes d."""

    @abstractmethod
    def _direction(self, like: Tensor, generator: SampleGenerator) -> Tensor:
        """Draw a float64 (B, n) change on the surface of the ball, uniform on it (L-infinity: in the cube)."""

    def project(self, x_adv: Tensor, x: Tensor, eps: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Return the nearest point in ball and box; exact, by sorting. ``eps`` (B,): a budget for each sample."""
        radius = self.budget if eps is None else eps.double().unsqueeze(1)
        change = (x_adv.double() - x.double()).flatten(1)
        room = torch.minimum(self._room(x, change), change.abs())
        return add_towards_zero(x, change.sign() * self._shrink(change.abs(), room, radius))

    def maximise_linear(self, x: Tensor, grad: Tensor) -> Tensor:  # type: ignore[override]
        """Return the maximiser of ``<grad, x_adv>``; exact."""
        gain = _scaled(grad)
        return add_towards_zero(x, gain.sign() * self._fill(gain.abs(), self._room(x, gain)))

    def sample(self, x: Tensor, generator: SampleGenerator) -> Tensor:  # type: ignore[override]
        """Return a random change of full size, then clipped to the domain (so it may end up smaller)."""
        change = self._direction(x, generator)
        return add_towards_zero(x, change.sign() * torch.minimum(change.abs(), self._room(x, change)))

    def random_start(self, x: Tensor, generator: SampleGenerator) -> Tensor:  # type: ignore[override]
        """Return a point uniform in the ball, clipped to the domain."""
        change = self._direction(x, generator)
        if not isinstance(self, Linf):  # the radius of a uniform point in an n-ball
            radius = generator.fork("radius").uniform(change[:, :1]) ** (1.0 / change.shape[1])
            change = change * radius
        return add_towards_zero(x, change.sign() * torch.minimum(change.abs(), self._room(x, change)))


def _scaled(grad: Tensor) -> Tensor:
    """Flatten to float64 and divide by the largest entry, so that tiny gradients keep their direction."""
    flat = grad.double().flatten(1)
    return flat / flat.abs().amax(1, keepdim=True).clamp_min(_TINY)


@dataclass(frozen=True)
class Linf(_Ball):
    """Every value may move by at most eps.

    Args:
        eps: Largest change of a value, input units; number or exact ratio such as ``"8/255"``.
        domain: Legal values; the widest meaningful eps is its width.

    Raises:
        ValueError: if eps is no number, negative or wider than the domain.
    """

    norm: ClassVar[str] = "linf"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget > self.domain.width:
            raise ValueError(
                f"eps={self.eps} is wider than the domain {self.domain}: write eps in input units, e.g. '8/255' for images"
            )

    def _diameter(self, values: int) -> float:
        return 1.0

    def _shrink(self, magnitude: Tensor, room: Tensor, eps: float | Tensor) -> Tensor:
        return room.clamp_max(eps)

    def _fill(self, gain: Tensor, room: Tensor) -> Tensor:
        return torch.where(gain > 0, room, 0.0).clamp_max(self.budget)

    def _direction(self, like: Tensor, generator: SampleGenerator) -> Tensor:
        return generator.uniform(like.double(), -self.budget, self.budget).flatten(1)

    def steepest_step(self, x_adv: Tensor, grad: Tensor, x: Tensor, step_size: float) -> Tensor:  # type: ignore[override]
        """Move every value by ``step_size`` along the sign of its gradient."""
        return x_adv + step_size * grad.sign()

    def _size(self, change: Tensor) -> Tensor:
        return change.abs().amax(1)


@dataclass(frozen=True)
class L2(_Ball):
    """The Euclidean length of the change is at most eps.

    Args:
        eps: Length in input units.
        domain: Legal values.

    Raises:
        ValueError: if eps is no number or negative.
    """

    norm: ClassVar[str] = "l2"

    def default_step(self, steps: int, done: int = 0) -> float:
        """Return a step that falls linearly from eps: walls bend the path, so a constant short step would not arrive."""
        return self.budget * (1 - done / steps)

    def _diameter(self, values: int) -> float:
        return values**0.5

    def _shrink(self, magnitude: Tensor, room: Tensor, eps: float | Tensor) -> Tensor:
        return fill_l2(magnitude, room, eps)

    def _fill(self, gain: Tensor, room: Tensor) -> Tensor:
        return fill_l2(gain, room, self.budget)

    def _direction(self, like: Tensor, generator: SampleGenerator) -> Tensor:
        noise = generator.normal(like.double()).flatten(1)
        return noise * (self.budget / noise.norm(dim=1, keepdim=True).clamp_min(_TINY))

    def steepest_step(self, x_adv: Tensor, grad: Tensor, x: Tensor, step_size: float) -> Tensor:  # type: ignore[override]
        """Move by ``step_size`` along the gradient."""
        gain = _scaled(grad)
        step = gain * (step_size / gain.norm(dim=1, keepdim=True).clamp_min(_TINY))
        return x_adv + step.view(x.shape).to(x.dtype)

    def _size(self, change: Tensor) -> Tensor:
        return change.norm(dim=1)


@dataclass(frozen=True)
class L1(_Ball):
    """The absolute changes add up to at most eps.

    Args:
        eps: Sum of absolute changes in input units.
        domain: Legal values.

    Raises:
        ValueError: if eps is no number or negative.

    Source:
        The projection on ball and box together, not one after the other: Croce and Hein, "Mind the box",
        arXiv 2103.01208.
    """

    norm: ClassVar[str] = "l1"

    def default_step(self, steps: int, done: int = 0) -> float:
        """Return a step that falls linearly from 4 eps: the projection takes back most of a step along a dense gradient."""
        return 4 * self.budget * (1 - done / steps)

    def _diameter(self, values: int) -> float:
        return values

    def _shrink(self, magnitude: Tensor, room: Tensor, eps: float | Tensor) -> Tensor:
        return project_l1(magnitude, room, eps)

    def _fill(self, gain: Tensor, room: Tensor) -> Tensor:
        return fill_l1(gain, room, self.budget)

    def _direction(self, like: Tensor, generator: SampleGenerator) -> Tensor:
        wide = like.double()
        sizes = -generator.fork("size").uniform(wide).clamp_min(2.0**-53).log().flatten(1)
        signs = generator.fork("sign").uniform(wide, -1.0, 1.0).sign().flatten(1)
        return signs * sizes * (self.budget / sizes.sum(1, keepdim=True).clamp_min(_TINY))

    def steepest_step(self, x_adv: Tensor, grad: Tensor, x: Tensor, step_size: float) -> Tensor:  # type: ignore[override]
        """Move by ``step_size`` (Euclidean length) along the gradient.

        The sparse vertex of the ball would move one value per step; the projection makes the iterate sparse anyway,
        and a gradient step followed by an exact projection reaches the optimum of a linear model.
        """
        gain = _scaled(grad)
        step = gain * (step_size / gain.norm(dim=1, keepdim=True).clamp_min(_TINY))
        return x_adv + step.view(x.shape).to(x.dtype)

    def _size(self, change: Tensor) -> Tensor:
        return change.abs().sum(1)
