"""Named lists of attacks: plain YAML that users copy and edit."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from sg_lightning.attacks.base import Attack
from sg_lightning.attacks.estimators import ENSEMBLES
from sg_lightning.attacks.registry import make_attack
from sg_lightning.domains import Domain
from sg_lightning.threats import Budgets, Joint, SingleThreat, Threat, is_relaxed
from sg_lightning.threats.base import is_share
from sg_lightning.threats.budget import THREATS

_KEYS = {"eps", "control", "attacks", "norms"}
_ORDER = list(THREATS)


@dataclass(frozen=True)
class Entry:
    """One threat and the attacks to run under it, cheap to dear; ``headline``: its figure enters the union."""

    threat: Threat
    attacks: tuple[Attack, ...]
    headline: bool

    @property
    def strongest(self) -> Attack | None:
        """The dearest attack that raises the loss by its gradients, if there is one."""
        return next((a for a in reversed(self.attacks) if not (a.gradient_free or a.minimal)), None)


@dataclass(frozen=True)
class Suite:
    """A resolved suite. Entries of a norm stand together with ascending budgets.

    Attributes:
        name: Name or file stem.
        entries: Threats with their attacks.
        control: Whether random perturbations are measured beside.
        hash: First 12 hex digits of the SHA-256 of its content: same hash, same measurement.

    Raises:
        ValueError: if the budgets of a norm mix shares and numbers.
    """

    name: str
    entries: tuple[Entry, ...]
    control: bool

    def __post_init__(self) -> None:
        for norm in self.norms:
            if len({is_share(entry.threat.eps) for entry in self.entries if entry.threat.norm == norm}) > 1:
                raise ValueError(
                    f"suite {self.name!r} mixes shares of the sample's events with numbers under {norm!r}: which is the "
                    "larger depends on the sample; use two suites"
                )

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms in order, each once."""
        return tuple(dict.fromkeys(entry.threat.norm for entry in self.entries))

    def applicable(self, model: object) -> tuple[Suite, list[str]]:
        """Leave out attacks whose gradient estimator has nothing to replace in a model, and say which."""
        left_out = {
            attack.name: attack.estimator.refusal(model)
            for entry in self.entries
            for attack in entry.attacks
            if attack.estimator is not None
        }
        refused = [name for name, reason in left_out.items() if reason is not None]
        entries = tuple(
            replace(entry, attacks=tuple(a for a in entry.attacks if a.name not in refused)) for entry in self.entries
        )
        return (replace(self, entries=entries), refused) if refused else (self, [])

    def describe(self) -> dict[str, Any]:
        """Return the whole content as plain data."""
        return {
            "control": self.control,
            "entries": [
                {"threat": e.threat.describe(), "attacks": [a.describe() for a in e.attacks], "headline": e.headline}
                for e in self.entries
            ],
        }

    @property
    def hash(self) -> str:
        """First 12 hex digits of the SHA-256 of :meth:`describe`."""
        content = json.dumps(self.describe(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()[:12]


def suite_names() -> list[str]:
    """List the suites that ship with the package."""
    return sorted(p.name[: -len(".yaml")] for p in files(__name__).iterdir() if p.name.endswith(".yaml"))


def load_suite(suite: str | Path | Suite, budgets: Budgets, domain: Domain | None = None) -> Suite:
    """Resolve a suite for the budgets of a data set.

    Args:
        suite: Name of a shipped suite, path of a YAML file, or a resolved suite (returned as it is).
        budgets: Budgets by norm; norms without one are left out unless the suite names them.
        domain: Legal values of the inputs; ``None``: that of each threat ([0, 1]; binary for event flips).

    Raises:
        ValueError: on an unknown suite, key, attack or norm, a norm without budget, or a threat whose perturbations of
            events would be infeasible without saying so.
    """
    if isinstance(suite, Suite):
        _refuse_hidden_relaxation(suite, domain)
        return suite
    name, content = read_suite(suite)
    unknown = set(content) - _KEYS
    if unknown:
        raise ValueError(f"suite {name!r} has unknown keys {sorted(unknown)}; known keys: {', '.join(sorted(_KEYS))}")
    if not budgets:
        raise ValueError(
            "no budgets: pass budgets={'linf': Budget(eps=('4/255', '8/255'), headline='8/255'), ...} or a data module "
            "that declares its own; what is a small perturbation depends on the data"
        )
    for norm in budgets:
        if norm not in THREATS:
            raise ValueError(f"budgets name the unknown norm {norm!r}; known norms: {', '.join(THREATS)}")
    wanted = content.get("norms", "all")
    norms = [norm for norm in _ORDER if norm in budgets] if wanted == "all" else list(wanted)
    for norm in norms:
        if norm not in budgets:
            raise ValueError(
                f"suite {name!r} attacks under {norm!r} but budgets are given only for {', '.join(budgets)}"
            )
        if is_relaxed(norm) and domain is not None and domain.lattice is None:
            raise ValueError(
                f"the norm {norm!r} is for data whose only legal values are whole numbers, but the domain is {domain}: use "
                f"{norm.removeprefix('relaxed_')!r}"
            )
    if content.get("eps", "all") not in ("all", "headline"):
        raise ValueError(
            f"suite {name!r}: eps must be 'all' or 'headline' (the values are the data set's), got {content['eps']!r}"
        )
    entries = []
    for norm in norms:
        budget = budgets[norm]
        for threat in budget.threats(norm, domain):
            headline = budget.is_headline(threat.eps)
            if headline or content.get("eps", "all") == "all":
                attacks = tuple(_build(name, item, threat) for item in _items(name, content, threat))
                twice = [a for a, count in Counter(attack.name for attack in attacks).items() if count > 1]
                if twice:
                    raise ValueError(f"suite {name!r} runs {twice[0]} twice under {norm}; change or drop one of them")
                entries.append(Entry(threat, attacks, headline))
    return Suite(name, tuple(entries), bool(content.get("control", True)))


def _refuse_hidden_relaxation(suite: Suite, domain: Domain | None) -> None:
    if domain is None or domain.lattice is None:
        return
    for entry in suite.entries:
        threat = entry.threat
        if not isinstance(threat, Joint) and threat.domain.lattice is None and not threat.relaxed:
            raise ValueError(
                f"suite {suite.name!r} attacks under {threat.norm!r} with values in {threat.domain}, but the data live in "
                f"{domain}: give the threat that domain, or use RelaxedLinf, RelaxedL2 or RelaxedL1, whose figures are "
                "marked infeasible"
            )


def read_suite(suite: str | Path) -> tuple[str, dict[str, Any]]:
    """Return name and content of a suite, not yet resolved for a data set.

    Raises:
        ValueError: on an unknown name, a missing file, or a file that is no suite.
    """
    path = Path(suite)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"no suite file {str(path)!r}; shipped suites: {', '.join(suite_names())}")
        text, name = path.read_text(encoding="utf-8"), path.stem
    elif str(suite) in suite_names():
        text, name = files(__name__).joinpath(f"{suite}.yaml").read_text(encoding="utf-8"), str(suite)
    else:
        raise ValueError(
            f"unknown suite {str(suite)!r}; choose one of {', '.join(suite_names())} or the path of a .yaml file"
        )
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"suite {name!r} is not valid YAML: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("attacks"), list) or not content["attacks"]:
        raise ValueError(f"suite {name!r} needs a list `attacks:`, e.g. '- {{attack: pgd, steps: 10}}'")
    return name, content


def _items(name: str, content: dict[str, Any], threat: SingleThreat) -> list[dict[str, Any]]:
    """List the attacks under a threat; what is made for a norm also runs under its relaxation."""
    items = []
    names = {threat.norm, threat.norm.removeprefix("relaxed_")}
    for item in content["attacks"]:
        if not isinstance(item, dict) or "attack" not in item:
            raise ValueError(
                f"suite {name!r}: each attack needs the key 'attack', e.g. {{attack: pgd, steps: 10}}, got {item!r}"
            )
        only = item.get("only", _ORDER)
        strange = set(only) - set(_ORDER)
        if strange:
            raise ValueError(
                f"suite {name!r}: 'only' names unknown norms {sorted(strange)}; known: {', '.join(_ORDER)}"
            )
        own = threat.domain.lattice or "none"
        lattice = item.get("lattice", own)
        if lattice not in ("binary", "count", "none"):
            raise ValueError(f"suite {name!r}: 'lattice' is binary, count or none (real values), got {lattice!r}")
        if names & set(only) and lattice == own:
            settings = {key: value for key, value in item.items() if key not in ("only", "lattice", "estimators")}
            swaps = item.get("estimators", [settings.pop("estimator", None)])
            swaps = ENSEMBLES.get(swaps, swaps) if isinstance(swaps, str) else swaps
            if not isinstance(swaps, list | tuple) or not swaps:
                raise ValueError(
                    f"suite {name!r}: 'estimators' is a list such as [training, {{name: atan, alpha: 5}}], or one of "
                    f"{', '.join(ENSEMBLES)}, got {swaps!r}"
                )
            items += [settings if swap is None else {**settings, "estimator": swap} for swap in swaps]
    return items


def _build(name: str, item: dict[str, Any], threat: Threat) -> Attack:
    try:
        return make_attack(threat, **item)
    except ValueError as error:
        raise ValueError(f"suite {name!r}: {error}") from error
