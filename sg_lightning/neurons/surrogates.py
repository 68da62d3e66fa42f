"""Surrogate gradients: what stands for the derivative of the spike in the backward pass.

With z = u - threshold, the forward pass is the step H(z) whatever the surrogate;
only dH/dz is replaced by ``derivative(z)``.

| name | class | derivative(z) |
|---|---|---|
| triangular | ``Triangular(width=1)`` | max(0, width - abs(z)) / width² |
| atan | ``Atan(alpha=2)`` | (alpha / 2) / (1 + (pi alpha z / 2)²) |
| fast_sigmoid | ``FastSigmoid(slope=25)`` | 1 / (1 + slope abs(z))² |
| sigmoid | ``Sigmoid(slope=25)`` | slope s (1 - s), s = 1 / (1 + exp(-slope z)) |
| rectangular | ``Rectangular(width=1)`` | 1 / width where abs(z) < width / 2, else 0 |
| gaussian | ``Gaussian(sigma=0.5)`` | exp(-z² / (2 sigma²)) / (sigma sqrt(2 pi)) |
| exponential | ``Exponential(slope=1, peak=1)`` | peak exp(-slope abs(z)) |
| straight_through | ``StraightThrough()`` | 1 |

``Atan``, ``FastSigmoid``, ``Sigmoid`` and ``StraightThrough`` are the functions of the same
name in ``snntorch.surrogate`` (there ``straight_through_estimator``), with its defaults.
``snntorch.surrogate.triangular`` changes sign at the threshold and has no counterpart here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from sg_lightning.recipes import Storable

_BY_CODE: dict[str, Surrogate] = {}


def of_code(code: str) -> Surrogate:
    """Return the surrogate whose ``code`` this is."""
    return _BY_CODE[code]


@Storable.register
class Surrogate:
    """Base of all surrogate gradients; immutable, elementwise, compared by value.

    Not a dataclass itself: jsonargparse, which reads the configs, accepts no subclasses for a dataclass type.

    Attributes:
        code: The class and its numbers as a string, for operators, which take plain values only; empty if the subclass
            is no dataclass of numbers, which keeps it from the fast paths of the neurons.
    """

    name: ClassVar[str]
    code: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            if isinstance(value, bool) or not 0.0 < number < math.inf:
                raise ValueError(f"{type(self).__name__}: {field.name} must be a finite number above 0, got {value!r}")
            object.__setattr__(self, field.name, number)
        self._enter()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.code:
            self._enter()  # it may come from another process

    def _enter(self) -> None:
        cls = type(self)
        values = ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))  # type: ignore[arg-type]
        # A notebook may define a class again under the same name.
        mark = "" if cls in SURROGATES.values() else f"#{id(cls)}"
        # Not a property: torch.compile reads a string that is there.
        object.__setattr__(self, "code", f"{cls.__name__}({values}){mark}")
        _BY_CODE.setdefault(self.code, self)

    @property
    def smooth(self) -> bool:
        """Whether :meth:`second_derivative` exists."""
        return type(self).second_derivative is not Surrogate.second_derivative

    def derivative(self, z: Tensor) -> Tensor:
        """Return the stand-in for dH/dz at ``z`` = membrane - threshold, same shape and dtype."""
        raise NotImplementedError

    def second_derivative(self, z: Tensor) -> Tensor:
        """Return d derivative / dz, which a gradient of a gradient needs.

        Raises:
            RuntimeError: The derivative has jumps or kinks, so that its own derivative misses a Dirac.
        """
        raise RuntimeError(
            f"the double backward with respect to the membrane needs the second derivative of the surrogate {self}, "
            f"which does not exist everywhere; use one of {', '.join(sorted(_smooth_names()))}, or take first-order "
            "gradients only (the finite-difference penalty needs no more)"
        )


@dataclass(frozen=True)
class Triangular(Surrogate):
    """Use max(0, width - abs(z)) / width².

    Args:
        width: Half the base of the triangle, above 0, in units of the membrane.

    Source: the SR paper's neuron (arXiv 2405.20355), width 1; Bellec et al., arXiv 1803.09574.
    """

    name: ClassVar[str] = "triangular"
    width: float = 1.0

    def derivative(self, z: Tensor) -> Tensor:  # noqa: D102
        return z.abs().mul_(-1 / self.width**2).add_(1 / self.width).relu_()


@dataclass(frozen=True)
class Atan(Surrogate):
    """Use (alpha / 2) / (1 + (pi alpha z / 2)²).

    Args:
        alpha: Sharpness, above 0; the peak is alpha / 2.

    Source: Fang et al., arXiv 2007.05785.
    """

    name: ClassVar[str] = "atan"
    alpha: float = 2.0

    def derivative(self, z: Tensor) -> Tensor:  # noqa: D102
        scale = self.alpha * math.pi**2 / 2
        return torch.addcmul(z.new_full((), 2 / self.alpha), z, z, value=scale).reciprocal_()

    def second_derivative(self, z: Tensor) -> Tensor:  # noqa: D102
        scale = math.pi / 2 * self.alpha
        w = scale * z
        v = 1 + w.square()
        return (-self.alpha * scale) * (w / v) / v  # in this order an overflow of w² gives 0, not NaN


@dataclass(frozen=True)
class FastSigmoid(Surrogate):
    """Use 1 / (1 + slope abs(z))².

    Args:
        slope: Sharpness, above 0; the peak is always 1.

    Source: Zenke and Ganguli, arXiv 1705.11146.
    """

    name: ClassVar[str] = "fast_sigmoid"
    slope: float = 25.0

    def derivative(self, z: Tensor) -> Tensor:  # noqa: D102
        return z.abs().mul_(self.slope).add_(1).square_().reciprocal_()

    def second_derivative(self, z: Tensor) -> Tensor:  # noqa: D102
        return (-2 * self.slope) * z.sign() * (1 + self.slope * z.abs()).reciprocal().pow(3)


@dataclass(frozen=True)
class Sigmoid(Surrogate):
    """Use slope s (1 - s) with s the logistic function of slope z.

    It is even in z and computed from s(-abs(z)), so it stays finite and accurate at slopes and
    membranes where the textbook quotient of exponentials gives NaN.

    Args:
        slope: Sharpness, above 0; the peak is slope / 4.

    Source: Zenke and Ganguli, arXiv 1705.11146.
    """

    name: ClassVar[str] = "sigmoid"
    slope: float = 25.0

    def derivative(self, z: Tensor) -> Tensor:  # noqa: D102
        s = z.abs().mul_(-self.slope).sigmoid_()
        return torch.addcmul(s, s, s, value=-1).mul_(self.slope)

    def second_derivative(self, z: Tensor) -> Tensor:  # noqa: D102
        w = self.slope * z
        s, rest = torch.sigmoid(w), torch.sigmoid(-w)
        return self.slope**2 * (s * rest) * (rest - s)


@dataclass(frozen=True)
class Rectangular(Surrogate):
    """Use 1 / width where abs(z) < width / 2, else 0.

    Args:
        width: Full width of the window, above 0, in units of the membrane.

    Source: Wu et al., arXiv 1706.02609.
    """

    name: ClassVar[str] = "rectangular"
    width: float = 1.0

    def derivative(self, z: Tensor) -> Tensor:  # noqa: D102
        # The mask is written as a float: bool tensors are several times slower on a CPU.
        return torch.lt(z.detach().abs(), self.width / 2, out=torch.empty_like(z)).mul_(1 / self.width)


@dataclass(frozen=True)
class Gaussian(Surrogate):
    """Use the normal density exp(-z² / (2 sigma²)) / (sigma sqrt(2 pi)).

    Args:
        sigma: Standard deviation, above 0, in units of the membrane.

    Source: Yin et al., arXiv 2103.12593.
    """

    name: ClassVar[str] = "gaussian"
    sigma: float = 0.5

    def derivative(self, z: Tensor) -> Tensor:  # noqa: D102
        peak = 1 / (self.sigma * math.sqrt(2 * math.pi))
        return (z / self.sigma).square_().mul_(-0.5).add_(math.log(peak)).exp_()

    def second_derivative(self, z: Tensor) -> Tensor:  # noqa: D102
        return -(z / self.sigma) / self.sigma * self.derivative(z)


@dataclass(frozen=True)
class Exponential(Surrogate):
    """Use peak exp(-slope abs(z)).

    Args:
        slope: Sharpness, above 0.
        peak: Value at the threshold, above 0; 0.3 is usual for damped gradients.

    Source: Shrestha and Orchard, arXiv 1810.08646.
    """

    name: ClassVar[str] = "exponential"
    slope: float = 1.0
    peak: float = 1.0

    def derivative(self, z: Tensor) -> Tensor:  # noqa: D102
        return z.abs().mul_(-self.slope).exp_().mul_(self.peak)


@dataclass(frozen=True)
class StraightThrough(Surrogate):
    """Use 1: the gradient passes the spike unchanged.

    Source: Bengio et al., arXiv 1308.3432.
    """

    name: ClassVar[str] = "straight_through"

    def derivative(self, z: Tensor) -> Tensor:  # noqa: D102
        return torch.ones_like(z)


SURROGATES: dict[str, type[Surrogate]] = {
    cls.name: cls
    for cls in (Triangular, Atan, FastSigmoid, Sigmoid, Rectangular, Gaussian, Exponential, StraightThrough)
}


def _smooth_names() -> list[str]:
    return [name for name, cls in SURROGATES.items() if cls.second_derivative is not Surrogate.second_derivative]


def from_name(name: str, **parameters: float) -> Surrogate:
    """Build a surrogate by its name.

    Args:
        name: A key of ``SURROGATES``, e.g. ``"atan"``.
        **parameters: Its width or sharpness, e.g. ``alpha=2``; without it the default.

    Raises:
        ValueError: Unknown name or parameter, or a value that is not a finite number above 0.
    """
    if name not in SURROGATES:
        raise ValueError(f"unknown surrogate {name!r}; choose one of {', '.join(sorted(SURROGATES))}")
    cls = SURROGATES[name]
    allowed = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    unknown = sorted(set(parameters) - set(allowed))
    if unknown:
        takes = " and ".join(allowed) or "no parameter"
        raise ValueError(f"surrogate {name!r} takes {takes}, got {', '.join(unknown)}")
    return cls(**parameters)
