"""The only place where an attack touches the model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from sg_lightning.attacks.answers import (
    Counts,
    Gradient,
    Health,
    all_finite_all_zero,
    check_graph,
    check_labels,
    check_logits,
)
from sg_lightning.attacks.capture import Graphs, Record, State
from sg_lightning.attacks.estimators import Estimator, Memory, beside
from sg_lightning.attacks.estimators.beside import Each, OtherSamples, Share
from sg_lightning.attacks.folding import folded, is_compiled
from sg_lightning.attacks.losses import Loss
from sg_lightning.attacks.rest import Rest
from sg_lightning.attacks.room import Room, cheap, rounded_up
from sg_lightning.inputs import Input, apply, batch_size, device_of, rebuild, select, tensors

if TYPE_CHECKING:
    from sg_lightning.attacks.search import Samples

Mode = Literal["eval", "train"]
OnNonfinite = Literal["mark", "raise"]


@dataclass
class Oracle:
    """Answers an attack's questions about a model and leaves the model exactly as it was.

    Inside :meth:`attacking` (entered by every call, re-entrant) each sub-module is in evaluation state, gradients are
    on even under ``inference_mode``; afterwards every training flag, buffer and random state is as before, also
    after an exception. Gradients are taken with respect to the input only: no ``.grad`` is ever written.

    Args:
        model: Any function ``x -> logits (B, K)``, usually a module.
        estimator: What replaces the surrogate gradients of spiking neurons; ``None``: nothing.
        eot: Gradients averaged per step (expectation over transformation), for stochastic models.
        votes: Fresh forward passes whose majority decides about success, for stochastic models.
        autocast: Dtype of the model call, e.g. ``torch.bfloat16``; inputs, losses and projections stay as they are.
        batch_size: Largest number of samples per model call; ``None``: all at once. Where memory runs out, half as many.
        on_nonfinite: ``"mark"`` the sample as invalid, or ``"raise"``.
        mode: ``"eval"``, or ``"train"`` to keep the flags as they are (batch statistics); buffers are restored anyway.
        record: Captures the iterations of attacks, :func:`~sg_lightning.attacks.capture.cuda_graph`; ``None``: they run as
            they are. Stochastic models, several modalities and estimators side by side always do.
        rest: Set by :meth:`seeing` only: the modalities that complete the points asked about. Whoever then asks about some
            samples of the batch says which (``rows``).

    Raises:
        ValueError: on settings out of range; later, if the model returns no logits or writes to its input in place.

    Source:
        EOT: Athalye et al., arXiv 1707.07397.
    """

    model: Callable[..., Any]
    estimator: Estimator | Each | None = None
    eot: int = 1
    votes: int = 1
    autocast: torch.dtype | None = None
    batch_size: int | None = None
    on_nonfinite: OnNonfinite = "mark"
    mode: Mode = "eval"
    record: Record | None = None
    rest: Rest | None = None
    counts: Counts = field(default_factory=Counts)
    health: Health = field(default_factory=Health)
    room: Room = field(default_factory=Room)

    def __post_init__(self) -> None:
        for name in ("eot", "votes", "batch_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
        for name, kind in (("on_nonfinite", OnNonfinite), ("mode", Mode)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        if not callable(self.model):
            raise TypeError(f"model must be callable, x -> logits, got {type(self.model).__name__}")
        refusal = None if self.estimator is None else self.estimator.refusal(self.model)
        if refusal is not None:
            raise ValueError(refusal)
        self.room.samples = self.batch_size if self.room.samples is None else self.room.samples
        self._compiled = is_compiled(self.model)  # once: every forward pass asks
        self._depth = 0
        self._folding = False
        self._graphs: Graphs | None = None
        self.classes = 0  # known after the first forward pass

    @property
    def modules(self) -> list[nn.Module]:
        """Every sub-module of the model; empty for a plain function."""
        return list(self.model.modules()) if isinstance(self.model, nn.Module) else []

    @property
    def passes(self) -> int:
        """Forward passes behind one gradient."""
        return self.eot * (1 if self.estimator is None else len(self.estimator.parts))

    def using(self, estimator: Estimator | Each | None) -> Oracle:
        """Return an oracle of the same model and the same counts with another estimator (``None``: this one)."""
        if estimator is None:
            return self
        other = replace(self, estimator=estimator)
        other.classes = self.classes
        return other

    def seeing(self, modality: str, x: dict[str, Tensor]) -> Oracle:
        """Return an oracle of the same model and counts whose inputs are one modality; the others are those of ``x``."""
        other = replace(self, rest=Rest(modality, x))
        other.classes = self.classes
        return other

    @property
    def _captures(self) -> bool:
        """Whether iterations are captured."""
        able = self.rest is None and not isinstance(self.estimator, Each) and self.on_nonfinite != "raise"
        return able and self._graphs is not None and not self._graphs.failed

    @property
    def _capturing(self) -> bool:
        return self._graphs is not None and self._graphs.capturing

    @property
    def stochastic(self) -> bool:
        """Whether a sub-module declares itself random (attribute ``stochastic``)."""
        return any(getattr(module, "stochastic", False) is True for module in self.modules)

    @property
    def per_sample(self) -> bool:
        """Whether the estimator's gradient of a sample depends on nothing but the sample."""
        return self.estimator is None or self.estimator.per_sample

    @contextmanager
    def attacking(self, *, fold: bool = False) -> Iterator[None]:
        """Enter evaluation state; leave everything as it was.

        Args:
            fold: Let convolutions do the work of their batch norms in between, see
                :func:`~sg_lightning.attacks.folding.folded`: faster, and what is found must be verified without.
        """
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            if self._depth == 0:
                stack.enter_context(self._preserved())
                if self.mode == "eval":
                    for module in self.modules:
                        module.training = False
            if fold and not self._folding:
                stack.enter_context(self._folded())
            self._depth += 1
            stack.callback(self._leave)
            yield

    @contextmanager
    def _folded(self) -> Iterator[None]:
        self._folding = True
        if self.record is not None and not self.stochastic:
            self._graphs = Graphs(self.record)  # for as long as the folded weights are there
        try:
            with folded(self.model):
                yield
        finally:
            self._folding, self._graphs = False, None

    @contextmanager
    def iterating(self, at: Any, progress: Any, *key: Hashable) -> Iterator[Callable[..., None]]:
        """Run the iterations of an attack, which change ``at`` and ``progress`` and nothing else.

        Inside the block, call what it gives with an iteration and what that one depends on beside tensors and ``key``.

        Args:
            at: The samples that the attack works on.
            progress: What it reports to.
            key: What makes its iterations other than those of other attacks.
        """
        graphs = self._graphs
        if graphs is None or not self._captures:
            yield lambda body, *_: body()
            return
        what = (*map(repr, key), repr(self.estimator))
        state = State([at, progress], [self.counts, self.health])
        try:
            yield lambda body, *more: graphs.run(body, (what, more), state)
        finally:  # nothing stays in the places of a graph
            state.bind({key: t.clone() for key, t in state.tensors().items()})

    def drop(self, at: Samples, open_: Tensor) -> None:
        """Take the samples that are not ``open_`` (B,) out; where iterations are captured, down to 1, 2, 4, 8, ... only.

        A graph is captured for every batch size, and those that stay beyond need change nothing.
        """
        if not self._captures:
            at.keep(open_)
            return
        count = int(open_.sum())
        size = (1 << (count - 1).bit_length()) if count else 0
        if size < len(open_):
            at.take((~open_).byte().argsort(stable=True)[:size].sort().values)

    def _leave(self) -> None:
        self._depth -= 1

    @contextmanager
    def _preserved(self) -> Iterator[None]:
        modules = self.modules
        flags = [module.training for module in modules]
        buffers = [(dict(m._buffers), {k: b.clone() for k, b in m._buffers.items() if b is not None}) for m in modules]
        cuda = sorted({p.device.index or 0 for m in modules for p in m.parameters(recurse=False) if p.is_cuda})
        with torch.random.fork_rng(devices=cuda):
            try:
                yield
            finally:
                for module, flag, (held, values) in zip(modules, flags, buffers, strict=True):
                    module.training = flag
                    module._buffers.clear()
                    module._buffers.update(held)
                    with torch.no_grad():
                        for name, value in values.items():
                            buffer = held[name]
                            if buffer is not None and not torch.equal(buffer, value):
                                buffer.detach().copy_(value)

    def logits(self, x: Input, rows: Tensor | None = None) -> Tensor:
        """Return logits (B, K) of one forward pass per sample, without graph.

        Args:
            x: Inputs (B, ...).
            rows: Which samples of the attacked batch these are, int64 (B,); ``None``: all, in order.
        """
        with self.attacking(), torch.no_grad():
            parts = self.room.chunks(
                x, lambda part, index: self._forward(part, self._some(rows, index, x)), fixed=self._capturing
            )
            return torch.cat(parts)

    def misclassified(self, x: Input, y: Tensor) -> Tensor:
        """Tell per sample (B,) whether most of ``votes`` fresh forward passes are wrong."""
        drawn = [self.logits(x) for _ in range(self.votes)]
        check_labels(y, drawn[0].shape[1])
        wrong = sum((logits.argmax(1) != y).int() for logits in drawn)
        return wrong * 2 > self.votes  # type: ignore[return-value]

    def correct(self, x: Input, y: Tensor) -> Tensor:
        """Tell per sample (B,) whether it is classified as ``y``."""
        return ~self.misclassified(x, y)

    def value_and_grad(
        self, x: Input, y: Tensor, loss: Loss, memory: Memory | None = None, rows: Tensor | None = None
    ) -> Gradient:
        """Evaluate loss, logits and input gradient; averaged over ``eot`` forward passes.

        Args:
            x: Inputs (B, ...).
            y: What the loss takes beside the logits, (B, ...).
            loss: Per-sample loss.
            memory: What the estimator knows of these samples from earlier calls; updated. ``None``: nothing.
            rows: Which samples of the attacked batch these are, int64 (B,); ``None``: all, in order.
        """
        memory = Memory() if memory is None else memory

        def evaluate(part: Input, index: Tensor) -> tuple[Gradient, Memory]:
            whole = len(index) == len(y)
            own = Memory(dict(memory.values)) if whole else memory.select(index)  # a pass may fail half-way
            return self._gradient(part, y[index], loss, own, self._some(rows, index, x)), own

        with self.attacking():
            found = self.room.chunks(x, evaluate, fixed=self._capturing)
        memory.put([own for _, own in found], [len(gradient.loss) for gradient, _ in found])
        parts = [gradient for gradient, _ in found]
        if len(parts) == 1:
            return parts[0]
        grads = [torch.cat(g) for g in zip(*(tensors(part.grad) for part in parts), strict=True)]
        return Gradient(
            torch.cat([p.loss for p in parts]),
            torch.cat([p.logits for p in parts]),
            rebuild(x, grads),
            torch.cat([p.invalid for p in parts]),
            torch.cat([p.zero for p in parts]),
        )

    def _gradient(self, x: Input, y: Tensor, loss: Loss, memory: Memory, rows: Tensor | None) -> Gradient:
        samples = batch_size(x)
        shares = beside.shares(self.estimator, rows, samples, y.device)
        if isinstance(self.estimator, Each):
            return self._averaged(x, y, loss, memory, rows, [shares])
        few = len(shares) > 1 and samples * len(shares) <= cheap(y.device)
        if few and not self.room.alone and beside.can_be_beside(self.model):  # nearly free
            trial = Memory(dict(memory.values))
            try:
                found = self._averaged(x, y, loss, trial, rows, [shares])
            except OtherSamples:
                self.room.alone = True
            else:
                memory.values = trial.values
                return found
        return self._averaged(x, y, loss, memory, rows, [[share] for share in shares])

    def _averaged(
        self, x: Input, y: Tensor, loss: Loss, memory: Memory, rows: Tensor | None, passes: list[list[Share]]
    ) -> Gradient:
        """Add up passes over all shares, and all draws."""
        samples = batch_size(x)
        weight = 1 / self.passes
        losses = logits = grads = None
        for draw in range(self.eot):
            # The statistics of an estimator are those of one pass, or the average would be over different rules.
            memory.frozen = draw > 0
            for one in passes:
                value, z, g = self._pass(x, y, loss, memory, rows, one, weight)
                losses, logits = _added(losses, value), _added(logits, z)
                grads = g if grads is None else [a + b for a, b in zip(grads, g, strict=True)]
        assert losses is not None
        assert logits is not None
        assert grads is not None
        memory.frozen = False
        self.counts.backwards += self.passes * samples
        invalid, zero = self._judged(grads)
        return Gradient(losses, logits, rebuild(x, grads), invalid, zero)

    def _pass(
        self, x: Input, y: Tensor, loss: Loss, memory: Memory, rows: Tensor | None, shares: list[Share], weight: float
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the sums of loss, logits and input gradients over ``shares``, taken in one pass, times ``weight``."""
        samples, known = batch_size(x), [share.memory(memory) for share in shares]
        given = [dict(own.values) for own in known]
        index = None
        if len(shares) > 1 or shares[0].index is not None:
            everyone = torch.arange(samples, device=y.device)
            index = torch.cat([everyone if share.index is None else share.index for share in shares])
            x, y, rows = select(x, index), y[index], index if rows is None else rows[index]
        # No copy, unless a tensor of inference mode, which cannot require gradients, comes in.
        x = apply(lambda t: (t.clone() if t.is_inference() else t.detach()).requires_grad_(), x)
        sizes = [samples if share.index is None else len(share.index) for share in shares]
        estimators = [share.estimator for share in shares]
        with beside.applied(self.model, list(zip(estimators, known, sizes, strict=True))):
            z = self._forward(x, rows)
            value = loss(z, y)
            check_graph(value)
            g = torch.autograd.grad(value.sum() * weight, tensors(x), allow_unused=True)
        grads = [torch.zeros_like(t) if part is None else part for t, part in zip(tensors(x), g, strict=True)]
        for share, own, had in zip(shares, known, given, strict=True):
            share.remember(memory, own, had, samples)
        value, z = value.detach() * weight, z.detach() * weight
        if index is None:
            return value, z, grads
        value, z, *grads = (t.new_zeros((samples, *t.shape[1:])).index_add_(0, index, t) for t in (value, z, *grads))
        return value, z, grads

    def differentiable(self, x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Callable[[Tensor], Gradient]]:
        """Return logits without graph, and how a gradient with respect to them turns into one of ``x``.

        For loops that are not ours and call the model themselves. With several draws or estimators the logits are the
        mean over them and the gradient is the mean of theirs, all at the gradient of the mean logits.

        Args:
            x: Inputs (B, ...), one tensor.
            rows: Which samples of the attacked batch these are, int64 (B,); ``None``: all, in order.

        Returns:
            Logits (B, K), and a function from (B, K) to a :class:`Gradient`; it may be called several times.
        """
        with self.attacking():
            x = x.detach().clone().requires_grad_()
            estimators = (None,) if self.estimator is None else self.estimator.parts
            passes = []
            for estimator in estimators * self.eot:
                memory = Memory()
                with nullcontext() if estimator is None else estimator.applied(self.model, memory):
                    passes.append((estimator, memory, self._forward(x, rows)))
                check_graph(passes[-1][2])
            logits = torch.stack([z.detach() for _, _, z in passes]).mean(0)

        def pull(upstream: Tensor) -> Gradient:
            grad = torch.zeros_like(x)
            with self.attacking():
                for estimator, memory, z in passes:
                    with nullcontext() if estimator is None else estimator.applied(self.model, memory):
                        (g,) = torch.autograd.grad(z, x, upstream / len(passes), retain_graph=True, allow_unused=True)
                    grad += 0 if g is None else g
            self.counts.backwards += len(passes) * batch_size(x)
            invalid, zero = self._judged([grad])
            return Gradient((upstream * logits).sum(1), logits, grad, invalid, zero)

        return logits, pull

    def _judged(self, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Tell whose gradient is not finite and whose is zero everywhere, bool (B,), and keep count."""
        finite, zero = all_finite_all_zero(grads)
        self.health.note(zero, ~finite)
        if self.on_nonfinite == "raise" and not bool(finite.all()):
            raise FloatingPointError(
                f"the input gradient of {int((~finite).sum())} of {len(finite)} samples is NaN or infinite; look for "
                "exploding activations or a surrogate gradient that overflows"
            )
        return ~finite, zero

    def _some(self, rows: Tensor | None, index: Tensor, x: Input) -> Tensor | None:
        """Return which samples of the attacked batch the places ``index`` of ``x`` are."""
        if self.rest is not None:
            assert isinstance(x, Tensor)
            self.rest.check(x, rows)
        if rows is not None:
            return rows[index]
        return None if len(index) == batch_size(x) else index

    def _forward(self, x: Input, rows: Tensor | None) -> Tensor:
        if self.rest is not None:
            assert isinstance(x, Tensor)
            x = self.rest.completed(x, rows)
        given = rounded_up(x) if self._compiled and self.estimator is None else x
        with nullcontext() if self.autocast is None else torch.autocast(device_of(x).type, dtype=self.autocast):
            before = _versions(given)
            z = self.model(given)
        if _versions(given) != before:
            raise ValueError(
                "the model writes to its input, so an attack would lose its point: let it work on a copy (x = x.clone()) or "
                "use operations that are not in place (x.clamp(0, 1) for x.clamp_(0, 1))"
            )
        self.counts.forwards += batch_size(x)
        if isinstance(z, Tensor):
            z = z if self.autocast is None else z.float()
            z = z if given is x else z[: batch_size(x)]
        if not self.classes:
            check_logits(z, batch_size(x))
            self.classes = z.shape[1]
        return z


def _versions(x: Input) -> list[int]:
    return [t._version for t in tensors(x) if not t.is_inference()]


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total + part
