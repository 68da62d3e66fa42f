"""Penalties on the input gradient of the true class: the sparse-gradient (SR) penalty and its family."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from sg_lightning.domains import Box, Domain, Domains
from sg_lightning.inputs import Input, apply, device_of, rebuild, tensors
from sg_lightning.objectives.directions import Ascent, Direction, ascend, flat
from sg_lightning.objectives.noise import NoiseTape
from sg_lightning.objectives.probability import Output, probability_at

Difference = Literal["forward", "backward", "central"]

# Near the highest fidelity on spiking ConvNets trained on 8 x 8 digits, two vanilla and one with the penalty: linf .78
# to .90 (.001: .66 to .77, .1: .70 to .78), l2 .82 to .92, l1 .75 to .88 (.01: .57 to .82), l0 .82 to .90 (.5: .67 to .75).
STEP_SIZE = {"linf": 0.01, "l2": 0.01, "l1": 0.3, "l0": 0.1}
COORDINATES = {"linf": 0, "l2": 0, "l1": 1, "l0": 8}


@dataclass(frozen=True)
class Measured:
    """What a penalty saw in one batch.

    Attributes:
        penalty: Scalar, differentiable in the parameters.
        quotient: The finite difference quotient of each sample (B,), detached; ``None`` for the ratio.
        slope: What the quotient estimates, the dual norm of the input gradient (B,), detached; ``None`` for the ratio.
    """

    penalty: Tensor
    quotient: Tensor | None = None
    slope: Tensor | None = None


@dataclass(frozen=True)
class FiniteDifference:
    """Options of :func:`sparse_gradient_penalty`, checked once and applied to many batches."""

    direction: Direction = "linf"
    step_size: float | Mapping[str, float] | None = None
    output: Output = "margin"
    power: Literal[1, 2] = 2
    difference: Difference = "forward"
    coordinates: int | None = None
    domain: Domains | None = None
    clamp: bool = False
    modality: str | None = None

    def __post_init__(self) -> None:
        _choice("direction", self.direction, get_args(Direction))
        _choice("output", self.output, get_args(Output))
        _choice("power", self.power, (1, 2))
        _choice("difference", self.difference, get_args(Difference))
        share = self.direction in ("l1", "l0")
        top = 1.0 if share else math.inf
        several = isinstance(self.step_size, Mapping)
        if several and (share or self.modality is not None):
            raise ValueError(
                "step sizes by modality are for the directions 'linf' and 'l2' over all modalities (those of 'l1' and 'l0' "
                f"are shares of each value's room), got {self.step_size} with direction={self.direction!r}, "
                f"modality={self.modality!r}"
            )
        sizes = list(self.step_size.values()) if isinstance(self.step_size, Mapping) else [self.step_size]
        if not sizes or not all(size is None or (0 < size <= top and math.isfinite(size)) for size in sizes):
            rule = "a share of the room in (0, 1]" if share else "finite and above 0"
            raise ValueError(f"step_size must be {rule} for direction={self.direction!r}, got {self.step_size}")
        if self.coordinates is not None and not share:
            raise ValueError(f"coordinates only applies to the directions 'l1' and 'l0', not to {self.direction!r}")
        if self.coordinates is not None and (isinstance(self.coordinates, bool) or self.coordinates < 1):
            raise ValueError(f"coordinates must be an integer >= 1, got {self.coordinates!r}")

    def measure(
        self, forward: Callable[[Input], Tensor], x: Input, y: Tensor, logits: Tensor, grad_scale: Tensor | float = 1.0
    ) -> Measured:
        """Compute the penalty from the logits of ``forward(x)``.

        Args:
            forward: Function from inputs to logits (B, K), for the further points.
            x: The input (B, ...) that ``logits`` were computed from; it requires grad.
            y: True classes (B,).
            logits: ``forward(x)`` with its graph.
            grad_scale: Multiplies the input gradient while it is computed, so that it does not vanish in float16.
        """
        probability = probability_at(logits, y, self.output)
        p = probability(logits)
        grad = input_gradient(p, x, grad_scale)
        uphill = self._step(x, grad)
        rise: Tensor = torch.zeros_like(p)
        length: Tensor | float = 0.0
        if self.difference != "backward":
            rise, length = probability(forward(self._moved(x, uphill))) - p, uphill.length
        if self.difference != "forward":
            downhill = self._step(x, apply(torch.neg, grad))
            rise = rise + p - probability(forward(self._moved(x, downhill)))
            length = length + downhill.length
        # A length of 0 (no room at the wall) comes with a rise of 0: that sample has nothing to penalise.
        quotient = rise / (length.clamp_min(torch.finfo(p.dtype).tiny) if isinstance(length, Tensor) else length)
        penalty = (quotient.square() if self.power == 2 else quotient.abs()).mean()
        return Measured(penalty, quotient.detach(), uphill.slope / grad_scale)

    def _step(self, x: Input, grad: Input) -> Ascent:
        if self.modality is not None:
            return self._step_in(self.modality, x, grad)
        if isinstance(self.step_size, Mapping):
            return self._weighted(self.step_size, x, grad)
        return self._ascend(x, grad, self.step_size, self._walls)

    def _ascend(self, x: Input, grad: Input, size: float | None, walls: Domains) -> Ascent:
        if size is None:
            size = STEP_SIZE[self.direction]
            if self.direction == "l2":
                size *= math.sqrt(sum(t[0].numel() for t in tensors(x)))
        return ascend(x, grad, self.direction, size, self.coordinates or COORDINATES[self.direction], walls)

    def _step_in(self, modality: str, x: Input, grad: Input) -> Ascent:
        """Step in one modality only."""
        if not isinstance(x, dict) or not isinstance(grad, dict) or modality not in x:
            raise ValueError(f"modality={modality!r}, but the input has {_modalities(x)}")
        walls, size = self._walls, self.step_size
        assert not isinstance(size, Mapping)
        step = self._ascend(x[modality], grad[modality], size, walls[modality] if isinstance(walls, dict) else walls)
        delta = {key: torch.zeros_like(part) for key, part in x.items()}
        return Ascent({**delta, modality: step.delta}, step.length, step.slope)  # type: ignore[dict-item]

    def _weighted(self, sizes: Mapping[str, float], x: Input, grad: Input) -> Ascent:
        """Step in coordinates in which every modality has the largest step size."""
        if not isinstance(x, dict) or sizes.keys() != x.keys():
            raise ValueError(f"step_size has {', '.join(sizes)}, but the input has {_modalities(x)}")
        largest = max(sizes.values())
        weights: Input = {key: torch.as_tensor(sizes[key] / largest).to(part) for key, part in x.items()}
        scale = lambda t, w: t * w
        step = self._ascend(x, apply(scale, grad, weights), largest, self._walls)
        return Ascent(apply(scale, step.delta, weights), step.length, step.slope)

    def _moved(self, x: Input, step: Ascent) -> Input:
        # A leaf is detached, so that the second branch does not compute a gradient for it that nobody reads.
        moved = apply(lambda t, d: (t if t.grad_fn is not None else t.detach()) + d, x, step.delta)
        walls = self._walls
        if not self.clamp:
            return moved
        if isinstance(walls, Domain):
            return apply(walls.clip, moved)
        assert isinstance(moved, dict)
        return {key: walls[key].clip(part) for key, part in moved.items()}

    @property
    def _walls(self) -> Domains:
        return Box() if self.domain is None else self.domain


@dataclass(frozen=True)
class GradientRatio:
    """Options of :func:`gradient_ratio_penalty`, checked once and applied to many batches."""

    output: Output = "margin"

    def __post_init__(self) -> None:
        _choice("output", self.output, get_args(Output))

    def measure(
        self, forward: Callable[[Input], Tensor], x: Input, y: Tensor, logits: Tensor, grad_scale: Tensor | float = 1.0
    ) -> Measured:
        """Compute the penalty from the logits of ``forward(x)``; arguments as :meth:`FiniteDifference.measure`."""
        p = probability_at(logits, y, self.output)(logits)
        g = flat(input_gradient(p, x, grad_scale, create_graph=True))
        # The ratio's derivative grows as 1 / |g|, so a gradient at the edge of underflow counts as none; and each
        # gradient is scaled by its largest entry, which cancels in the ratio but keeps the squares in range.
        top = g.detach().abs().amax(1)
        some = top > math.sqrt(torch.finfo(g.dtype).tiny)
        g = torch.where(some.unsqueeze(1), g, torch.ones_like(g)) / torch.where(some, top, 1.0).unsqueeze(1)
        ratio = g.abs().sum(1).square() / g.square().sum(1)
        return Measured(torch.where(some, ratio, torch.zeros_like(ratio)).mean())


GradientPenalty = FiniteDifference | GradientRatio


def sparse_gradient_penalty(
    forward: Callable[[Input], Tensor],
    x: Input,
    y: Tensor,
    *,
    logits: Tensor | None = None,
    direction: Direction = "linf",
    step_size: float | Mapping[str, float] | None = None,
    output: Output = "margin",
    power: Literal[1, 2] = 2,
    difference: Difference = "forward",
    coordinates: int | None = None,
    domain: Domains | None = None,
    clamp: bool = False,
    modality: str | None = None,
) -> Tensor:
    """Penalise the dual norm of the input gradient of the true class, by a finite difference.

    With p the probability of the true class and d a fixed step up its input gradient, the penalty is the batch mean of
    ((p(x + d) - p(x)) / |d|)^2. By default d = 0.01 sign(grad p), so it estimates ||grad p||_1^2. Both p are
    differentiated with respect to the parameters, d is not: no second-order gradient is taken. In training mode both
    forward passes update the batch-norm statistics. Without ``logits``, dropout and random encodings draw the same numbers
    in all passes.

    Args:
        forward: Function from inputs to logits (B, K).
        x: Input (B, ...), or a dict of inputs by modality, floating point, in natural units.
        y: True classes, int64 (B,).
        logits: ``forward(x)``, to share a forward pass already made; ``x`` must have required grad then.
        direction: Threat norm whose damage is penalised, through the dual norm of the gradient. ``"linf"``: ||g||_1.
            ``"l2"``: ||g||_2. ``"l1"``: the largest |g|. ``"l0"``: the largest gains room x |g|, summed.
        step_size: Above 0. ``"linf"``: change of every value (default 0.01). ``"l2"``: Euclidean length (default
            0.01 sqrt(m) for m input values, as long as the sign step). ``"l1"``, ``"l0"``: share of its room, the
            distance to the wall, that each chosen value crosses (default 0.3 and 0.1). The defaults are where the difference
            agrees best with the gradient: shorter steps read spike quantisation, longer ones saturate. For ``"linf"`` and
            ``"l2"`` also one by modality: the gradient of each is then weighted by its share of the largest.
        output: ``"margin"`` for a softmax over the true and the best wrong class, chosen at ``x``; ``"softmax"`` for
            all classes.
        power: 2 for the square, 1 for the absolute value.
        difference: ``"forward"`` steps up the true class, ``"backward"`` down, ``"central"`` both ways (one pass
            more). A confident sample has no way up, so ``"forward"`` saturates there.
        coordinates: Number of values that ``"l1"`` (default 1) and ``"l0"`` (default 8) move.
        domain: Legal values of the input, for the room and for ``clamp``, or those of each modality; ``None`` for [0, 1].
        clamp: Clip the stepped input to the domain. The quotient is not rescaled.
        modality: The modality of a dictionary input whose gradient is penalised; ``None``: all together.

    Returns:
        A scalar >= 0 with a graph to the parameters.

    Raises:
        ValueError: on an option out of range, labels or logits of wrong shape, ``logits`` that do not depend on ``x``.
        TypeError: if ``forward`` does not return a tensor.
        RuntimeError: under ``torch.no_grad()``.

    Source:
        Liu et al., "Enhancing adversarial robustness in SNNs with sparse gradients", ICML 2024, arXiv 2405.20355, and
        its official code, which the defaults reproduce. Dual norms for other threats: Finlay and Oberman, "Scaleable
        input gradient regularization for adversarial robustness", arXiv 1905.11468.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net, x, y = torch.nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 2])
        >>> sparse_gradient_penalty(net, x, y).shape
        torch.Size([])
    """
    options = FiniteDifference(direction, step_size, output, power, difference, coordinates, domain, clamp, modality)
    return measure(options, forward, x, y, logits=logits).penalty


def gradient_ratio_penalty(
    forward: Callable[[Input], Tensor],
    x: Input,
    y: Tensor,
    *,
    logits: Tensor | None = None,
    output: Output = "margin",
) -> Tensor:
    """Penalise density of the input gradient whatever its size: the batch mean of (||g||_1 / ||g||_2)^2.

    Between 1 (one value matters) and m (all alike); three times it is the gap between adversarial and random damage
    under a small L-infinity budget. Differentiates a gradient, so every layer must support double backward: spiking
    neurons do with a smooth surrogate (``Atan``, ``Sigmoid``, ``FastSigmoid``, ``Gaussian``) and raise an error with
    others. A sample without gradient (in float32: all entries below 1e-19) counts 0.

    Args:
        forward: Function from inputs to logits (B, K).
        x: Input (B, ...), or a dict of inputs by modality, floating point.
        y: True classes, int64 (B,).
        logits: ``forward(x)``, to share a forward pass already made; ``x`` must have required grad then.
        output: As in :func:`sparse_gradient_penalty`.

    Returns:
        A scalar >= 0 with a graph to the parameters.

    Raises:
        ValueError: on labels or logits of wrong shape, ``logits`` that do not depend on ``x``.
        RuntimeError: under ``torch.no_grad()``, or by a layer that cannot be differentiated twice.

    Source:
        The first-order gap of arXiv 2405.20355 without the bound by the number of non-zero entries.
    """
    return measure(GradientRatio(output), forward, x, y, logits=logits).penalty


def measure(
    penalty: GradientPenalty,
    forward: Callable[[Input], Tensor],
    x: Input,
    y: Tensor,
    *,
    logits: Tensor | None = None,
    grad_scale: Tensor | float = 1.0,
) -> Measured:
    """Apply a penalty, with the forward pass at ``x`` if ``logits`` is ``None``."""
    if not torch.is_grad_enabled():
        raise RuntimeError("a gradient penalty needs gradients; call it outside torch.no_grad() and inference_mode()")
    for t in tensors(x):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            what = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"a gradient penalty needs floating-point inputs, got {what}; convert them with .float()")
    if logits is not None:
        return penalty.measure(forward, x, y, logits, grad_scale)
    x = watched(x)
    tape = NoiseTape(device_of(x))
    logits = forward(x)

    def again(point: Input) -> Tensor:
        with tape.replay():
            return forward(point)

    return penalty.measure(again, x, y, logits, grad_scale)


def watched(x: Input) -> Input:
    """Return ``x`` where it requires grad already, else a view of the same values that does."""
    return apply(lambda t: t if t.requires_grad else t.detach().requires_grad_(), x)


def input_gradient(p: Tensor, x: Input, grad_scale: Tensor | float = 1.0, *, create_graph: bool = False) -> Input:
    """Differentiate each p (B,) with respect to its sample of ``x``; no ``.grad`` is touched and the graph is kept.

    Raises:
        ValueError: if ``x`` does not require grad or ``p`` does not depend on it.
    """
    parts = tensors(x)
    if not all(t.requires_grad for t in parts):
        raise ValueError("x does not require grad; call x.requires_grad_() before the forward pass that gives logits=")
    seed = torch.ones_like(p) * grad_scale
    grads: tuple[Tensor | None, ...] = (None,)
    if p.requires_grad:
        grads = torch.autograd.grad(p, parts, seed, retain_graph=True, create_graph=create_graph, allow_unused=True)
    if all(g is None for g in grads):
        raise ValueError("logits do not depend on x; pass the very tensor x that went into the forward pass")
    return rebuild(x, [torch.zeros_like(t) if g is None else g for g, t in zip(grads, parts, strict=True)])


def fidelity(measured: Measured) -> Tensor:
    """Correlate, over the batch, the finite differences with the gradient norm that they stand for.

    A spiking network is piecewise constant: the difference uses true forward passes, its direction the surrogate
    gradient. A step too small reads spike quantisation, one too large saturates; both show as a correlation near 0.

    Args:
        measured: A batch of at least 2 samples under a :class:`FiniteDifference`.

    Returns:
        Pearson's correlation of the absolute quotient and the slope, a scalar in [-1, 1]; 0 if either is constant.
    """
    if measured.quotient is None or measured.slope is None:
        raise ValueError("fidelity compares a finite difference with a gradient; the ratio penalty has none")
    a, b = measured.quotient.abs().double(), measured.slope.double()
    a, b = a - a.mean(), b - b.mean()
    spread = a.norm() * b.norm()
    return torch.where(spread > 0, (a * b).sum() / spread.clamp_min(torch.finfo(spread.dtype).tiny), 0.0)


def _modalities(x: Input) -> str:
    return ", ".join(x) if isinstance(x, dict) else "a single tensor"


def _choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(map(str, allowed))}")
