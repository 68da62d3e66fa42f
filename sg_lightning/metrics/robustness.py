"""torchmetrics classes for worst-case accuracy, exact under data-parallel training.

The states are sums of counts, so that a reduction over processes gives the accuracy over all samples, whatever the
sizes of the batches. A sample counts only if it is right every time it is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric

Predictions: TypeAlias = Tensor | Sequence[Tensor]


def _right(preds: Predictions, target: Tensor, name: str) -> Tensor:
    """Tell per sample, bool (B,), whether every prediction is the target. Non-finite logits are never right."""
    answers = [preds] if isinstance(preds, Tensor) else list(preds)
    if not answers:
        raise ValueError(f"{name} is an empty list; give logits (B, K), classes (B,), or a list of such tensors")
    right = torch.ones_like(target, dtype=torch.bool)
    for answer in answers:
        floating = answer.is_floating_point()
        if answer.dim() != (2 if floating else 1) or answer.shape[0] != target.shape[0]:
            raise ValueError(
                f"{name} must be logits (B, K) or integer classes (B,) for {target.shape[0]} targets, "
                f"got {answer.dtype} of shape {tuple(answer.shape)}"
            )
        if floating:
            right &= torch.isfinite(answer).all(1) & (answer.argmax(1) == target)
        else:
            right &= answer == target
    return right


def _check_target(target: Tensor) -> None:
    if target.dim() != 1 or target.is_floating_point():
        raise ValueError(f"target must be integer classes (B,), got {target.dtype} of shape {tuple(target.shape)}")


class RobustAccuracy(Metric):
    """Share of samples that are right under everything that was tried on them.

    ``update(preds, target)`` takes one prediction per sample or a list of them, e.g. of the clean input, of two
    attacks and of three restarts; a sample counts only if all are right. That is what robust accuracy means, and it
    differs from the mean of accuracies. NaN or infinite logits count as wrong.

    Shape:
        - preds: logits (B, K) or integer classes (B,), or a list of such tensors
        - target: integer classes (B,)

    Example:
        >>> metric, target = RobustAccuracy(), torch.tensor([0, 1, 2])
        >>> metric.update([torch.tensor([0, 1, 0]), torch.tensor([0, 2, 2])], target)
        >>> round(float(metric.compute()), 3)
        0.333
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound: float = 0.0
    plot_upper_bound: float = 1.0

    right: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Predictions, target: Tensor) -> None:
        """Count a batch."""
        _check_target(target)
        self.right += _right(preds, target, "preds").sum()
        self.total += target.shape[0]

    def compute(self) -> Tensor:
        """Return the share in [0, 1]; NaN before the first sample."""
        return self.right / self.total


class UnionAccuracy(Metric):
    """Accuracy per threat, the lowest of them, and the share right under all of them at once.

    The union is taken per sample: an attacker who may choose the norm for every sample leaves this much. It is at
    most the lowest accuracy of a single threat, and usually below.

    Args:
        threats: Names, e.g. ``("linf", "l2", "l1", "l0")``; every update must bring them all. Include ``"clean"`` for
            a union that also asks for a right answer on the clean input.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: no names, a name twice, or one of ``"union"`` and ``"min"``, which are keys of the result.

    Source: union accuracy after Tramèr and Boneh, "Adversarial training and robustness for multiple perturbations",
    2019 (arXiv 1904.13000).

    Example:
        >>> metric, target = UnionAccuracy(("linf", "l0")), torch.tensor([0, 1, 2, 3])
        >>> metric.update({"linf": torch.tensor([0, 1, 0, 0]), "l0": torch.tensor([0, 0, 2, 3])}, target)
        >>> {name: float(share) for name, share in metric.compute().items()}
        {'linf': 0.5, 'l0': 0.75, 'min': 0.5, 'union': 0.25}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound: float = 0.0
    plot_upper_bound: float = 1.0

    right: Tensor
    right_everywhere: Tensor
    total: Tensor

    def __init__(self, threats: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        names = (threats,) if isinstance(threats, str) else tuple(threats)
        if not names or len(set(names)) < len(names) or {"union", "min"} & set(names):
            raise ValueError(f"threats must be different names other than 'union' and 'min', got {list(names)}")
        self.threats = names
        self.add_state("right", torch.zeros(len(names), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("right_everywhere", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Mapping[str, Predictions], target: Tensor) -> None:
        """Count a batch: the predictions of the same samples under every threat, as in :class:`RobustAccuracy`."""
        _check_target(target)
        if set(preds) != set(self.threats):
            raise ValueError(f"preds must have exactly the threats {list(self.threats)}, got {list(preds)}")
        right = torch.stack([_right(preds[name], target, f"preds[{name!r}]") for name in self.threats])
        self.right += right.sum(1)
        self.right_everywhere += right.all(0).sum()
        self.total += target.shape[0]

    def compute(self) -> dict[str, Tensor]:
        """Return shares in [0, 1]: one per threat, then ``min`` and ``union``; NaN before the first sample."""
        shares = self.right / self.total
        return {
            **dict(zip(self.threats, shares, strict=True)),
            "min": shares.min(),
            "union": self.right_everywhere / self.total,
        }
