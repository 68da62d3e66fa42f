"""Threats by name, and the budgets that a data set declares for each norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias, get_args

from sg_lightning.domains import Domain
from sg_lightning.threats.base import SingleThreat, is_share, parse_eps
from sg_lightning.threats.norms import L1, L2, Linf
from sg_lightning.threats.relaxed import RelaxedL1, RelaxedL2, RelaxedLinf
from sg_lightning.threats.retiming import Measure, SpikeRetiming
from sg_lightning.threats.sparse import L0, EventFlips

THREATS: dict[str, Callable[..., SingleThreat]] = {
    **{threat.norm: threat for threat in (Linf, L2, L1, L0, EventFlips)},
    **{f"retime_{measure}": partial(SpikeRetiming, measure=measure) for measure in get_args(Measure)},
    **{threat.norm: threat for threat in (RelaxedLinf, RelaxedL2, RelaxedL1)},
}


def make_threat(norm: str, eps: float | str, domain: Domain | None = None, **settings: Any) -> SingleThreat:
    """Build a threat from the name of its norm.

    Raises:
        ValueError: on an unknown norm, with the known ones, or a bad eps.
    """
    if norm not in THREATS:
        raise ValueError(f"unknown norm {norm!r}; known norms: {', '.join(THREATS)}")
    if domain is not None:
        settings["domain"] = domain
    return THREATS[norm](eps, **settings)


@dataclass(frozen=True)
class Budget:
    """The budgets of one norm on one data set.

    Args:
        eps: Budgets to measure, ascending; numbers or ratios such as ``"8/255"``, or shares of each sample's events
            such as ``"2%"``, kept verbatim. Shares and numbers do not mix: no order holds between them.
        headline: The one whose figure enters the union.
        reason: Why this headline, for the report.

    Raises:
        ValueError: if eps is empty, not ascending, zero, mixes shares and numbers, or lacks the headline.
    """

    eps: tuple[float | str, ...]
    headline: float | str
    reason: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.eps, str | float | int):
            raise ValueError(f"eps must be a sequence of budgets such as ('4/255', '8/255'), got {self.eps!r}")  # noqa: TRY004
        object.__setattr__(self, "eps", tuple(self.eps))
        if len({is_share(eps) for eps in self.eps}) > 1:
            raise ValueError(
                f"eps mixes shares of the sample's events with numbers, got {self.eps}: which is the larger depends on the "
                "sample; measure the two in separate evaluations"
            )
        values = [parse_eps(eps) for eps in self.eps]
        if not values or values[0] <= 0 or any(a >= b for a, b in pairwise(values)):
            raise ValueError(f"eps must be positive and strictly ascending, got {self.eps}")
        if not any(self.is_headline(eps) for eps in self.eps):
            raise ValueError(f"the headline {self.headline!r} is not one of the budgets {self.eps}")

    def threats(self, norm: str, domain: Domain | None = None) -> list[SingleThreat]:
        """Build the threats of this norm, ascending."""
        return [make_threat(norm, eps, domain) for eps in self.eps]

    def is_headline(self, eps: float | str) -> bool:
        """Tell whether ``eps`` is the headline budget."""
        return parse_eps(eps) == parse_eps(self.headline, "headline") and is_share(eps) == is_share(self.headline)


Budgets: TypeAlias = dict[str, Budget]
