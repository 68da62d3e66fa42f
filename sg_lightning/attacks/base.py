"""What an attack is: an optimiser inside a threat model. Hyper-parameters only, no model inside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self  # typing has it from Python 3.11

from sg_lightning.attacks.answers import Gradient
from sg_lightning.attacks.estimators import Estimator
from sg_lightning.attacks.losses import higher
from sg_lightning.attacks.oracle import Oracle
from sg_lightning.inputs import Input, assign, batch_size, detached, device_of, select, tensors, where
from sg_lightning.recipes import Storable
from sg_lightning.sampling import SampleGenerator, as_sample_generator
from sg_lightning.threats import Threat

Goal = Literal["success", "loss"]


@dataclass(frozen=True)
class AttackResult:
    """What an attack found for each sample of the batch.

    Attributes:
        x_adv: First adversarial example found, for survivors the point of highest loss. From minimal-norm attacks the
            smallest one found, which may be larger than eps, or the clean input if there is none.
        success: Misclassified inside the threat, bool (B,).
        invalid: A gradient was not finite, bool (B,); such a sample counts as not robust.
        loss: Loss at ``x_adv``, float64 (B,).
        iterations: Gradient steps until the first success, for survivors and minimal-norm attacks all of them, int64
            (B,).
        queries: Forward passes spent on the sample, int64 (B,).
        gradients: Input gradients taken (averages over ``eot`` draws count once), int64 (B,).
        zero_gradients: How many of them were zero everywhere, int64 (B,).
    """

    x_adv: Input
    success: Tensor
    invalid: Tensor
    loss: Tensor
    iterations: Tensor
    queries: Tensor
    gradients: Tensor
    zero_gradients: Tensor

    def of(self, index: Tensor) -> AttackResult:
        """Return what was found for the samples ``index``."""
        found: dict[str, Any] = {part.name: select(getattr(self, part.name), index) for part in fields(self)}
        return AttackResult(**found)

    def again(self, index: Tensor) -> AttackResult:
        """Return what was found for the samples ``index``, at no further cost."""
        free = torch.zeros_like(index)
        return replace(self.of(index), queries=free, gradients=free, zero_gradients=free)


class Progress:
    """The best point so far of every sample of a batch; attacks report what they evaluated."""

    def __init__(self, x: Input, goal: Goal) -> None:
        size, device = batch_size(x), device_of(x)
        self.x_adv = detached(x)
        self.goal = goal
        self.success = torch.zeros(size, dtype=torch.bool, device=device)
        self.invalid = torch.zeros_like(self.success)
        self.loss = torch.full((size,), -torch.inf, dtype=torch.float64, device=device)
        self.iterations = torch.zeros(size, dtype=torch.int64, device=device)
        self.queries = torch.zeros_like(self.iterations)
        self.gradients = torch.zeros_like(self.iterations)
        self.zero_gradients = torch.zeros_like(self.iterations)

    def record(
        self,
        index: Tensor,
        x_adv: Input,
        loss: Tensor,
        wrong: Tensor,
        iteration: int | Tensor,
        queries: int,
        found: Gradient | None = None,
    ) -> None:
        """Keep the evaluated points of the samples ``index`` that improve on what is held; ``found`` with a gradient."""
        searched = self._spend(index, iteration, queries, found)
        first = wrong & searched if self.goal == "success" else torch.zeros_like(wrong)
        better = searched & (first | higher(loss, self.loss[index]))
        # Written without boolean indexing, which makes a GPU wait for the host.
        assign(self.x_adv, index, where(better, x_adv, select(self.x_adv, index)))
        self.loss[index] = torch.where(better, loss.double(), self.loss[index])
        self.success[index] = torch.where(better, wrong if self.goal == "loss" else first, self.success[index])
        self._mark(index, found)

    def _spend(self, index: Tensor, iteration: int | Tensor, queries: int, found: Gradient | None = None) -> Tensor:
        """Count what the samples ``index`` cost; return who was still searched, bool."""
        searched = self._searched(index)
        self.queries[index] += queries * searched
        self.iterations[index] = torch.where(searched, iteration, self.iterations[index])
        if found is not None:
            self.gradients[index] += searched
            self.zero_gradients[index] += searched & found.zero
        return searched

    def _searched(self, index: Tensor) -> Tensor:
        """Tell which of the samples ``index`` are still searched, bool: for the highest loss, broken ones too."""
        return ~(self.success | self.invalid)[index] if self.goal == "success" else ~self.invalid[index]

    def discard(self, index: Tensor, iteration: int | Tensor, queries: int, found: Gradient | None = None) -> None:
        """Count a point outside the threat, which a search may pass through but never keeps."""
        self._spend(index, iteration, queries, found)
        self._mark(index, found)

    def absorb(self, index: Tensor, run: Progress, rows: Tensor, done: int) -> None:
        """Add the ``rows`` of another progress, as if this one had been told of them, after ``done`` iterations."""
        searched = self._searched(index)
        index, rows = index[searched], rows[searched]
        for total, spent in ((self.queries, run.queries), (self.gradients, run.gradients),
                             (self.zero_gradients, run.zero_gradients)):  # fmt: skip
            total[index] += spent[rows]
        self.iterations[index] = done + run.iterations[rows]
        better = higher(run.loss[rows], self.loss[index])
        if self.goal == "success":
            better |= run.success[rows]
        kept, rows_kept = index[better], rows[better]
        assign(self.x_adv, kept, select(run.x_adv, rows_kept))
        self.loss[kept] = run.loss[rows_kept]
        self.success[kept] = run.success[rows_kept]
        self.invalid[index] |= run.invalid[rows]

    def _mark(self, index: Tensor, found: Gradient | None) -> None:
        if found is not None:
            self.invalid[index] |= found.invalid & ~self.success[index]

    def open(self, index: Tensor) -> Tensor:
        """Tell which of the samples ``index`` are neither broken nor invalid, bool."""
        return ~(self.success | self.invalid)[index]

    def result(self) -> AttackResult:
        """Freeze into a result."""
        return AttackResult(
            self.x_adv, self.success, self.invalid, self.loss, self.iterations, self.queries, self.gradients,
            self.zero_gradients,
        )  # fmt: skip


@Storable.register
@dataclass(frozen=True)
class Attack(ABC):
    """Base of all attacks. Frozen: the same object attacks any model under any domain.

    Args:
        threat: The allowed perturbations.
        estimator: What replaces the surrogate gradients of spiking neurons; ``None``: what the oracle says.
    """

    threat: Threat
    estimator: Estimator | None = field(default=None, kw_only=True)
    kind: ClassVar[str]
    minimal: ClassVar[bool] = False  # True: looks for the smallest adversarial examples, whatever eps is
    gradient_free: ClassVar[bool] = False  # True: asks the attacked model for logits only
    abreast: ClassVar[bool] = False  # True: samples may be told apart by their estimator, see abreast.py

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Threat):
            raise TypeError(f"threat must be a threat model such as Linf('8/255'), got {self.threat!r}")
        if self.estimator is not None and not isinstance(self.estimator, Estimator):
            raise TypeError(f"estimator must be a gradient estimator such as BPTT(Atan(2.0)), got {self.estimator!r}")

    @property
    def title(self) -> str:
        """Kind and main settings, e.g. ``pgd-40x2``."""
        return self.kind

    @property
    def name(self) -> str:
        """Short name for rows and tables: the title, and the estimator if there is one, e.g. ``pgd-40/assg``."""
        return self.title if self.estimator is None else f"{self.title}/{self.estimator.label}"

    def __call__(
        self, model: Callable[..., Any], x: Input, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Input:
        """Return adversarial inputs, like the attack libraries people know.

        Args:
            model: Any function ``x -> logits (B, K)``.
            x: Clean inputs (B, ...) in the domain of the threat.
            y: Labels (B,), int64.
            generator: Source of random starts; torch's global one if ``None``.
        """
        return self.run(Oracle(model), x, y, generator=generator).x_adv

    def run(
        self,
        oracle: Oracle,
        x: Input,
        y: Tensor,
        *,
        generator: SampleGenerator | torch.Generator | None = None,
        early_drop: bool = True,
        goal: Goal = "success",
    ) -> AttackResult:
        """Attack a batch and report everything about it.

        Args:
            oracle: The model behind its oracle.
            x: Clean inputs (B, ...).
            y: Labels (B,), int64.
            generator: Per-sample noise; a torch generator or ``None`` draws its keys.
            early_drop: Spend nothing on samples already broken. Does not change the result.
            goal: ``"success"`` keeps the first adversarial example of a sample (evaluation). ``"loss"`` keeps the
                point of highest loss of every sample at fixed batch shapes (training).

        Raises:
            ValueError: if shapes do not match, labels are no classes of the model, ``x`` is not finite, or the budget
                is larger than the domain.
        """
        check_batch(x, y)
        self.threat.check(x)
        noise = as_sample_generator(generator, batch_size(x))
        oracle = oracle.using(self.estimator)
        drop = early_drop and goal == "success" and not oracle.stochastic and oracle.per_sample
        # The smallest examples lie at the boundary of the model that is asked: folded, it is another by rounding.
        with oracle.attacking(fold=not self.minimal):
            x, y = detached(x), y.detach().clone()
            progress = self._progress(x, goal)
            self._search(oracle, x, y, noise, progress, drop)
            if oracle.stochastic and goal == "success":
                # A single noisy error is no success: the majority of fresh draws decides.
                progress.success = oracle.misclassified(progress.x_adv, y) & ~progress.invalid
                progress.queries += oracle.votes
        return progress.result()

    def _progress(self, x: Input, goal: Goal) -> Progress:
        """Return what keeps the best points."""
        return Progress(x, goal)

    @abstractmethod
    def _search(
        self, oracle: Oracle, x: Input, y: Tensor, noise: SampleGenerator, progress: Progress, early_drop: bool
    ) -> None:
        """Search the threat's set, reporting every evaluated point to ``progress``."""

    def with_threat(self, threat: Threat) -> Self:
        """Return the same attack under another threat."""
        return replace(self, threat=threat)

    def describe(self) -> dict[str, Any]:
        """Return plain data that identifies the attack without its threat (for hashes and tables)."""
        settings = {k: v for k, v in vars(self).items() if k not in ("threat", "estimator")}
        swapped = {} if self.estimator is None else {"estimator": self.estimator.describe()}
        return {"attack": self.kind, **settings, **swapped}


def check_batch(x: Input, y: Tensor) -> None:
    """Raise ``ValueError`` with the cure on inputs and labels that do not fit."""
    size = batch_size(x)
    if y.dim() != 1 or y.dtype != torch.int64 or y.shape[0] != size or size == 0:
        raise ValueError(
            f"expected labels of dtype int64 and shape ({size},) for {size} samples (at least one), got {y.dtype} of "
            f"shape {tuple(y.shape)}"
        )
    for part in tensors(x):
        if part.dim() < 2 or not part.is_floating_point() or part.shape[0] != size:
            raise ValueError(
                f"expected float inputs (B, ...) with B={size}, got {part.dtype} of shape {tuple(part.shape)}"
            )
        if not bool(torch.isfinite(part).all()):
            raise ValueError("the inputs hold NaN or infinite values; clean the data before attacking")
    if bool((y < 0).any()):
        raise ValueError(f"labels must be >= 0, got {int(y.min())}")
