"""Add the sparse-gradient penalty to the loss of any LightningModule."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sg_lightning.callbacks.compiled import kept_buffers
from sg_lightning.domains import Domain, Domains
from sg_lightning.inputs import Input, device_of, tensors
from sg_lightning.modules.checks import refuse_sharding
from sg_lightning.objectives.directions import Direction
from sg_lightning.objectives.noise import NoiseTape
from sg_lightning.objectives.probability import Output, check_indices, check_label_range, check_logits
from sg_lightning.objectives.sparse_gradient import (
    Difference,
    FiniteDifference,
    GradientPenalty,
    GradientRatio,
    Measured,
    fidelity,
    measure,
    watched,
)

_KEPT_CALLS = 16  # forward passes of one step that are looked at; an attack inside the step may make many


@dataclass(frozen=True)
class _Call:
    """One call of the module's own ``forward`` with gradients on."""

    x: Input
    logits: Tensor
    forward: Callable[[Input], Tensor]


class SparseGradient(Callback):
    """Add ``weight`` times a penalty on the input gradient of the true class to the training loss.

    Works on any LightningModule with automatic optimisation whose batch is ``(x, y)`` and whose ``forward(x)`` returns
    logits (B, K). The penalty is taken at the very inputs at which the step called ``self(x)`` on the way to its loss:
    the clean ones, or the adversarial ones under adversarial training (SR*); the mean if the loss uses several. That
    forward pass is shared, so the penalty costs one more forward, its backward, and one backward to the input. If the
    step does not call ``self(x)`` the penalty is taken at the batch's x for two more forward passes, with a warning.

    Correct under mixed precision with and without loss scaling, gradient accumulation, clipping, DDP and
    ``torch.compile`` of the network (``"ratio"`` needs a second derivative, which compiled networks lack). The logged
    training loss of the module does not contain the penalty; ``train/sg_penalty`` (before weighting) is logged beside
    it, and ``train/sg_fidelity``, the correlation over a batch of the finite difference with the gradient norm that it
    stands for: near 0 the step size reads noise.

    Args:
        weight: Factor of the penalty in the loss, >= 0; 0 switches the callback off.
        penalty: ``"difference"`` for :func:`~sg_lightning.objectives.sparse_gradient_penalty`, ``"ratio"`` for
            :func:`~sg_lightning.objectives.gradient_ratio_penalty`, which needs smooth surrogates.
        direction: Threat norm, see there: ``"linf"``, ``"l2"``, ``"l1"`` or ``"l0"``.
        step_size: Length of the step in the units of the input of ``forward``, or one by modality; ``None`` for the
            direction's default.
        output: ``"margin"`` (true against best wrong class) or ``"softmax"``.
        power: 2 for the square, 1 for the absolute value.
        difference: ``"forward"``, ``"backward"`` or ``"central"``.
        coordinates: Number of values that ``"l1"`` and ``"l0"`` move; ``None`` for the default.
        domain: Legal values of the input; ``None`` for that of the module's ``backbone`` if it has one, else [0, 1].
        clamp: Clip the stepped input to the domain.
        modality: The modality of a dictionary input whose gradient is penalised; ``None``: all together.

    Raises:
        ValueError: on a negative weight or a bad option, at construction; on manual optimisation or a sharding
            strategy, before training; on labels out of range or outputs that are no logits, in the first step.

    Source:
        Liu et al., arXiv 2405.20355 (default options: their official code).
    """

    def __init__(
        self,
        weight: float,
        *,
        penalty: Literal["difference", "ratio"] = "difference",
        direction: Direction = "linf",
        step_size: float | Mapping[str, float] | None = None,
        output: Output = "margin",
        power: Literal[1, 2] = 2,
        difference: Difference = "forward",
        coordinates: int | None = None,
        domain: Domains | None = None,
        clamp: bool = False,
        modality: str | None = None,
    ) -> None:
        super().__init__()
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight must be finite and >= 0 (0 switches the penalty off), got {weight}")
        self.weight = weight
        options = FiniteDifference(
            direction, step_size, output, power, difference, coordinates, domain, clamp, modality
        )
        self.penalty: GradientPenalty = options
        if penalty == "ratio":
            if options != FiniteDifference(output=output):
                raise ValueError("penalty='ratio' takes no finite difference; of the options only output= applies")
            self.penalty = GradientRatio(output)
        elif penalty != "difference":
            raise ValueError(f"unknown penalty {penalty!r}; choose one of difference, ratio")
        self._penalty = self.penalty  # with the domain of the module that is fitted
        self._first = True  # no step seen in this fit
        self._handles: list[RemovableHandle] = []
        self._fitting = ExitStack()
        self._batch: Any = None
        self._listening = False
        self._calls: deque[_Call] = deque(maxlen=_KEPT_CALLS)
        self._tapes: list[NoiseTape | None] = []

    def unpack(self, batch: Any) -> tuple[Input, Tensor]:
        """Return inputs and labels of a batch; override it for batches that are not ``(x, y)``."""
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            what = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
            raise ValueError(
                f"SparseGradient needs batches (x, y), got a {what}; subclass it and override unpack(batch) -> (x, y)"
            )
        return batch[0], batch[1]

    # -- life cycle: hooks live from the start of fit to its end, captured tensors for one step --

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before any data is read."""
        if stage != "fit" or not self.weight:
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} uses manual optimisation, so SparseGradient cannot add to its loss; call "
                "sg_lightning.objectives.sparse_gradient_penalty in its training_step instead"
            )
        refuse_sharding(
            trainer, "SparseGradient", "the penalty is a forward and a backward pass beside the strategy's own"
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to watch the module's forward calls."""
        if not self.weight:
            return
        self._release()
        self._first = True
        domain = getattr(getattr(pl_module, "backbone", None), "domain", None)
        if (
            isinstance(self.penalty, FiniteDifference)
            and self.penalty.domain is None
            and isinstance(domain, Domain | dict)
        ):
            self._penalty = replace(self.penalty, domain=domain)
        self._fitting.enter_context(kept_buffers(pl_module))
        self._handles = [
            pl_module.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            pl_module.register_forward_hook(self._after_forward, with_kwargs=True),
        ]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the batch, whose inputs another callback may still replace in place."""
        if self._handles:
            self._batch, self._listening = batch, True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let go of everything that belongs to the step."""
        self._forget()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was, also after an error or an interrupt."""
        self._release()

    def _forget(self) -> None:
        self._batch = None
        self._listening = False
        self._calls.clear()
        self._tapes.clear()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._fitting.close()
        self._penalty = self.penalty
        self._forget()

    # -- what the module's forward was called with --

    @torch.compiler.disable
    def _before_forward(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hand the module a view of its input that requires grad; the caller's tensor stays as it is."""
        if not self._listening:
            return None
        x = _first_argument(args, kwargs)
        usable = torch.is_grad_enabled() and _is_input(x)
        self._tapes.append(NoiseTape(device_of(x)) if usable else None)
        return _with_first_argument(watched(x), args, kwargs) if usable else None

    @torch.compiler.disable
    def _after_forward(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not self._listening or not self._tapes:
            return
        tape = self._tapes.pop()
        if tape is None or not isinstance(output, Tensor) or output.dim() != 2 or not output.requires_grad:
            return

        def again(point: Input) -> Tensor:
            point_args, point_kwargs = _with_first_argument(point, args, kwargs)
            with tape.replay():
                return module(*point_args, **point_kwargs)

        self._calls.append(_Call(_first_argument(args, kwargs), output, again))

    def _points(self, pl_module: LightningModule, loss: Tensor, x: Input, y: Tensor) -> list[_Call]:
        """Return the forward calls that the loss depends on, or make one."""
        calls = [call for call in self._calls if call.logits.shape[0] == y.shape[0]]
        if calls and loss.requires_grad:
            # Runs only from the loss back to the logits. Passes of an attack inside the step drop out here.
            used = torch.autograd.grad(
                loss, [call.logits for call in calls], torch.ones_like(loss), retain_graph=True, allow_unused=True
            )
            calls = [call for call, grad in zip(calls, used, strict=True) if grad is not None]
        if calls:
            return calls
        if self._first:
            rank_zero_warn(
                f"SparseGradient found no call self(x) with logits (B, K) behind the loss of {type(pl_module).__name__}"
                ".training_step; it calls forward twice more per step. Call self(x) in training_step to share its pass."
            )
        if not _is_input(x):
            what = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"SparseGradient needs floating-point inputs or a dict of them, got {what}; use .float()")
        point, tape = watched(x), NoiseTape(device_of(x))
        logits = pl_module(point)
        check_logits(logits, f"{type(pl_module).__name__}.forward(x)")

        def again(moved: Input) -> Tensor:
            with tape.replay():
                return pl_module(moved)

        return [_Call(point, logits, again)]

    # -- the penalty --

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add the penalty to the loss, in place, as if the step had done it."""
        if not self._listening:
            return
        self._listening = False  # our own forward passes are not the step's
        try:
            measured = self._measure(trainer, pl_module, loss)
        finally:
            self._calls.clear()
            self._listening = True  # an optimiser may run the step again
        value = torch.stack([m.penalty for m in measured]).mean()
        # Lightning has already divided the loss by the number of accumulated batches, and scaled it for float16.
        term = self.weight * value / trainer.accumulate_grad_batches
        scaler = _scaler(trainer)
        loss.add_(term if scaler is None else scaler.scale(term))
        logged = {"train/sg_penalty": value.detach()}
        size = len(self.unpack(self._batch)[1])
        if size > 1 and isinstance(self.penalty, FiniteDifference):
            logged["train/sg_fidelity"] = torch.stack([fidelity(m) for m in measured]).mean()
        pl_module.log_dict(logged, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        self._first = False

    def _measure(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> list[Measured]:
        x, y = self.unpack(self._batch)
        check_indices(y)
        scaler = _scaler(trainer)
        # The input gradient must not vanish in float16 either; the scale is the one a mean over the batch would get.
        scale = 1.0 if scaler is None else scaler.scale(torch.ones((), device=loss.device)) / len(y)
        with trainer.precision_plugin.train_step_context():
            points = self._points(pl_module, loss, x, y)
            if self._first:
                check_label_range(y, points[0].logits.shape[1])
                self._check_units(points[0].x, x)
            return [measure(self._penalty, p.forward, p.x, y, logits=p.logits, grad_scale=scale) for p in points]

    def _check_units(self, seen: Input, x: Input) -> None:
        """Warn where the module normalises before its ``forward``: the step is then in other units than the data."""
        if isinstance(self.penalty, GradientRatio) or not _is_input(x):
            return
        for inner, outer in zip(tensors(seen), tensors(x), strict=False):
            ratio = float(inner.detach().float().std() / outer.float().std())
            if ratio <= 0.5 or 2 <= ratio < math.inf:  # neither for a constant batch
                rank_zero_warn(
                    f"forward() sees inputs spread {ratio:.2g} times as wide as the batch's, so step_size is not in the "
                    f"units of the data; normalise inside forward, or scale step_size by {ratio:.2g}"
                )


def _scaler(trainer: Trainer) -> torch.amp.GradScaler | None:
    return getattr(trainer.precision_plugin, "scaler", None)


def _first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _with_first_argument(
    x: Input, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): x}


def _is_input(x: Any) -> bool:
    parts = list(x.values()) if isinstance(x, dict) else [x]
    return bool(parts) and all(isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 0 for t in parts)
