"""Threats by name, and the budgets that a data set declares for each norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias, get_args

from sg_lightning.domains import Domain, Domains
from sg_lightning.threats.base import SingleThreat, Threat, is_share, parse_eps
from sg_lightning.threats.joint import Joint
from sg_lightning.threats.modality import Modality
from sg_lightning.threats.norms import L1, L2, Linf
from sg_lightning.threats.relaxed import RelaxedL1, RelaxedL2, RelaxedLinf
from sg_lightning.threats.retiming import Measure, SpikeRetiming
from sg_lightning.threats.sparse import L0, EventFlips

THREATS: dict[str, Callable[..., SingleThreat]] = {
    **{threat.norm: threat for threat in (Linf, L2, L1, L0, EventFlips)},
    **{f"retime_{measure}": partial(SpikeRetiming, measure=measure) for measure in get_args(Measure)},
    **{threat.norm: threat for threat in (RelaxedLinf, RelaxedL2, RelaxedL1)},
}


def split_norm(name: str) -> tuple[str, str]:
    """Split ``<modality>_<norm>``: ``"audio_flips"`` gives ``("audio", "flips")``, a norm alone ``("", norm)``.

    Raises:
        ValueError: if it ends with no known norm, with the known ones.
    """
    if name in THREATS:
        return "", name
    for norm in sorted(THREATS, key=len, reverse=True):  # relaxed_linf before linf
        if name.endswith(f"_{norm}"):
            return name.removesuffix(f"_{norm}"), norm
    raise ValueError(f"unknown norm {name!r}; known norms: {', '.join(THREATS)}, for one modality <modality>_<norm>")


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

    def is_headline(self, eps: float | str) -> bool:
        """Tell whether ``eps`` is the headline budget."""
        return parse_eps(eps) == parse_eps(self.headline, "headline") and is_share(eps) == is_share(self.headline)


@dataclass(frozen=True)
class JointBudget(Budget):
    """The budgets of an attack on several modalities at once; its name begins with ``joint``.

    Args:
        eps: Shares of the headline budget of every modality, ascending, e.g. ``(0.5, 1)``: at 0.5 the attacker has half of
            each. At 1 the threat contains that of each modality alone.
        headline: The share whose figure enters the union.
        reason: Why this headline, for the report.
        of: Names of the budgets that are shared, one per modality, e.g. ``("image_linf", "audio_flips")``.

    Raises:
        ValueError: as :class:`Budget`, on shares above 1, or fewer than two modalities.
    """

    of: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(is_share(eps) or parse_eps(eps) > 1 for eps in self.eps):
            raise ValueError(f"eps are shares of the budgets in `of`, numbers above 0 and up to 1, got {self.eps}")
        object.__setattr__(self, "of", tuple(self.of))
        modalities = [split_norm(name)[0] for name in self.of]
        if len(modalities) < 2 or len(set(modalities)) < len(modalities) or "" in modalities:
            raise ValueError(
                "a joint budget needs `of`, the budgets of at least two modalities, one each, e.g. "
                f"('image_linf', 'audio_flips'), got {self.of}"
            )


Budgets: TypeAlias = dict[str, Budget]


def make_threats(name: str, budgets: Budgets, domain: Domains | None = None) -> list[Threat]:
    """Build the threats of one entry of ``budgets``, ascending.

    Args:
        name: A norm; for dictionary inputs ``<modality>_<norm>``, or what begins with ``joint`` for a
            :class:`JointBudget`.
        budgets: All budgets; those that a joint one names are among them.
        domain: Legal values, by modality for dictionary inputs; ``None``: that of each threat.

    Raises:
        ValueError: on names, modalities and domains that do not belong together.
    """
    budget = budgets[name]
    if isinstance(budget, JointBudget) != name.startswith("joint"):
        raise ValueError(
            f"the budget {name!r} is a {type(budget).__name__}; a JointBudget, and no other, is called joint..."
        )
    if isinstance(budget, JointBudget):
        parts: dict[str, Threat] = {}
        for part in budget.of:
            modality, norm = split_norm(part)
            if part not in budgets:
                raise ValueError(f"{name} shares the budget {part!r}, but there are only {', '.join(budgets)}")
            parts[modality] = make_threat(norm, budgets[part].headline, _legal(part, modality, domain))
        return [Joint(parts, eps, name) for eps in budget.eps]
    modality, norm = split_norm(name)
    made = [make_threat(norm, eps, _legal(name, modality, domain)) for eps in budget.eps]
    return [Modality(modality, threat) for threat in made] if modality else list(made)


def _legal(name: str, modality: str, domain: Domains | None) -> Domain | None:
    """Return the legal values of what a budget is about."""
    if domain is None:
        return None
    if isinstance(domain, Domain):
        if modality:
            raise ValueError(
                f"the budget {name!r} is for the modality {modality!r}, but the inputs are single tensors in {domain}"
            )
        return domain
    if modality not in domain:
        told = f"names the modality {modality!r}" if modality else "names no modality"
        raise ValueError(
            f"the budget {name!r} {told}, but the inputs have {', '.join(domain)}: call it {next(iter(domain))}_linf, e.g."
        )
    return domain[modality]
