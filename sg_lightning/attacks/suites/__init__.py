"""Named lists of attacks: plain YAML that users copy and edit."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from sg_lightning.attacks.base import Attack
from sg_lightning.attacks.estimators import ENSEMBLES
from sg_lightning.attacks.modalities import InTurn, OnModality
from sg_lightning.attacks.registry import make_attack
from sg_lightning.domains import Domain, Domains
from sg_lightning.threats import Budgets, Joint, Modality, Threat, is_relaxed, make_threats, split_norm
from sg_lightning.threats.base import is_share
from sg_lightning.threats.budget import THREATS

_KEYS = {"eps", "control", "attacks", "norms"}
_ORDER = list(THREATS)
_JOINT = "joint"


@dataclass(frozen=True)
class Entry:
    """One threat and the attacks to run under it, cheap to dear; ``headline``: its figure enters the union."""

    threat: Threat
    attacks: tuple[Attack, ...]
    headline: bool

    @property
    def strongest(self) -> Attack | None:
        """The dearest attack that raises the loss by its gradients, if there is one."""
        return _strongest(self.attacks)


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
        """Leave out attacks whose gradient estimator has nothing to replace in a model, and say which.

        Attacks in turn stay, with the training gradients.
        """
        refused: dict[str, None] = {}
        entries = []
        for entry in self.entries:
            fitting: list[Attack] = []
            for attack in entry.attacks:
                if _refused(attack, model):
                    refused[attack.name] = None
                elif isinstance(attack, InTurn):
                    plain = tuple(replace(a, estimator=None) if _refused(a, model) else a for a in attack.attacks)
                    fitting.append(replace(attack, attacks=plain))
                else:
                    fitting.append(attack)
            entries.append(replace(entry, attacks=tuple(fitting)))
        return replace(self, entries=tuple(entries)), list(refused)

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


def load_suite(suite: str | Path | Suite, budgets: Budgets, domain: Domains | None = None) -> Suite:
    """Resolve a suite for the budgets of a data set.

    Args:
        suite: Name of a shipped suite, path of a YAML file, or a resolved suite (returned as it is).
        budgets: Budgets by norm; norms without one are left out unless the suite names them. For dictionary inputs by
            ``<modality>_<norm>``, under which attacks made for the norm run with the other modalities held fixed, and
            ``joint...``, see :class:`~sg_lightning.threats.JointBudget`. A norm that the suite names stands for every
            modality that has a budget in it.
        domain: Legal values of the inputs, by modality for dictionaries; ``None``: that of each threat ([0, 1]; binary for
            event flips).

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
    norms = _norms(name, content.get("norms", "all"), budgets)
    for norm in norms:
        if not is_relaxed(norm) or domain is None:
            continue
        legal = domain if isinstance(domain, Domain) else domain.get(split_norm(norm)[0])
        if legal is not None and legal.lattice is None:
            raise ValueError(
                f"the norm {norm!r} is for data whose only legal values are whole numbers, but the domain is {legal}: use "
                f"{norm.replace('relaxed_', '')!r}"
            )
    if content.get("eps", "all") not in ("all", "headline"):
        raise ValueError(
            f"suite {name!r}: eps must be 'all' or 'headline' (the values are the data set's), got {content['eps']!r}"
        )
    entries = []
    for norm in norms:
        budget = budgets[norm]
        for threat in make_threats(norm, budgets, domain):
            headline = budget.is_headline(threat.eps)
            if headline or content.get("eps", "all") == "all":
                attacks = _attacks(name, content, threat)
                twice = [a for a, count in Counter(attack.name for attack in attacks).items() if count > 1]
                if twice:
                    raise ValueError(f"suite {name!r} runs {twice[0]} twice under {norm}; change or drop one of them")
                entries.append(Entry(threat, attacks, headline))
    return Suite(name, tuple(entries), bool(content.get("control", True)))


def _norms(name: str, wanted: Any, budgets: Budgets) -> list[str]:
    """List the budgets that a suite attacks, norm by norm for each modality, joint ones last."""
    modalities = list(dict.fromkeys(split_norm(norm)[0] for norm in budgets if not norm.startswith(_JOINT)))
    places = {}
    for norm in budgets:
        if not norm.startswith(_JOINT):
            modality, single = split_norm(norm)
            places[norm] = (modalities.index(modality), _ORDER.index(single))
    ordered = [*sorted(places, key=lambda norm: places[norm]), *(norm for norm in budgets if norm.startswith(_JOINT))]
    if wanted == "all":
        return ordered
    norms = []
    for norm in wanted:
        meant = [n for n in ordered if norm == n or (n in places and norm == split_norm(n)[1])]
        if not meant:
            raise ValueError(
                f"suite {name!r} attacks under {norm!r} but budgets are given only for {', '.join(budgets)}"
            )
        norms += meant
    return norms


def _refuse_hidden_relaxation(suite: Suite, domain: Domains | None) -> None:
    for entry in suite.entries:
        threat = entry.threat
        parts = dict(threat.threats) if isinstance(threat, Joint) else {getattr(threat, "modality", ""): threat}
        for modality, part in parts.items():
            legal = domain.get(modality) if isinstance(domain, dict) else domain
            if legal is not None and legal.lattice is not None and part.domain.lattice is None and not part.relaxed:
                raise ValueError(
                    f"suite {suite.name!r} attacks under {threat.norm!r} with values in {part.domain}, but the data live "
                    f"in {legal}: give the threat that domain, or use RelaxedLinf, RelaxedL2 or RelaxedL1, whose figures "
                    "are marked infeasible"
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


def _refused(attack: Attack, model: object) -> bool:
    return attack.estimator is not None and attack.estimator.refusal(model) is not None


def _strongest(attacks: Sequence[Attack]) -> Attack | None:
    return next((a for a in reversed(attacks) if not (a.gradient_free or a.minimal)), None)


def _attacks(name: str, content: dict[str, Any], threat: Threat) -> tuple[Attack, ...]:
    """Build the attacks under a threat."""
    if isinstance(threat, Modality):
        assert threat.threat is not None
        return tuple(OnModality(threat, attack) for attack in _attacks(name, content, threat.threat))
    attacks: list[Attack] = []
    for item in _items(name, content, threat):
        if item["attack"] == InTurn.kind and isinstance(threat, Joint):
            dearest = [_strongest(_attacks(name, content, part)) for _, part in threat.threats]
            given = {key: value for key, value in item.items() if key != "attack"}
            if None in dearest or set(given) - {"rounds"}:
                raise ValueError(
                    f"suite {name!r}: in_turn has the setting rounds, and takes the dearest gradient attack that the suite "
                    f"has for the norm of each modality, got {item!r}"
                )
            attacks.append(InTurn(threat, tuple(a for a in dearest if a is not None), **given))
        else:
            attacks.append(_build(name, item, threat))
    return tuple(attacks)


def _items(name: str, content: dict[str, Any], threat: Threat) -> list[dict[str, Any]]:
    """List the attacks under a threat; what is made for a norm also runs under its relaxation."""
    items = []
    joint = isinstance(threat, Joint)
    names = {_JOINT} if joint else {threat.norm, threat.norm.removeprefix("relaxed_")}
    for item in content["attacks"]:
        if not isinstance(item, dict) or "attack" not in item:
            raise ValueError(
                f"suite {name!r}: each attack needs the key 'attack', e.g. {{attack: pgd, steps: 10}}, got {item!r}"
            )
        known = [*_ORDER, _JOINT]
        only = item.get("only", known)
        strange = set(only) - set(known)
        if strange:
            raise ValueError(f"suite {name!r}: 'only' names unknown norms {sorted(strange)}; known: {', '.join(known)}")
        own = "joint" if joint else threat.domain.lattice or "none"
        lattice = item.get("lattice", own)
        if lattice not in ("binary", "count", "none", own):
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
