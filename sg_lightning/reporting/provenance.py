"""What was run, in words and as lists: data, attacks, budgets, samples, seeds, versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sg_lightning.evaluation import SuiteRecord
from sg_lightning.reporting import summary
from sg_lightning.reporting.style import norm_label
from sg_lightning.reporting.summary import Results

UNITS = {
    "linf": "largest change of one input value",
    "l2": "Euclidean length of the change",
    "l1": "sum of all changes",
    "flips": "events or spikes flipped",
    "retime_inf": "largest shift of a spike, in steps",
    "retime_1": "steps by which spikes are shifted, in all",
    "retime_0": "spikes moved in time",
}


def unit(results: Results, norm: str) -> str:
    """Say what the budget of a norm counts, e.g. ``pixels changed``."""
    for result in results.values():
        for entry in result.suite.content["entries"]:
            if entry["threat"]["norm"] == norm and "unit" in entry["threat"]:
                return f"{entry['threat']['unit']} changed"
    if norm.startswith("joint"):
        return "share of the budget of every modality"
    single = next((name for name in UNITS if norm == name or norm.endswith(f"_{name}")), "")
    return UNITS.get(single, "")


def listed(words: Sequence[str]) -> str:
    """Join words as a sentence does: ``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def in_words(results: Results, settings: Mapping[str, Any]) -> list[str]:
    """Say in sentences what was run."""
    samples = sorted({len(result.ids) for result in results.values()})
    verb = "was attacked" if len(results) == 1 else "were attacked, each on its own,"
    where = f" of {settings['data']}" if isinstance(settings.get("data"), str) else ""
    threats = []
    for norm in summary.norms(results):
        eps = next(list(summary.budgets(r, norm).values()) for r in results.values() if norm in r.norms)
        threats.append(f"{norm_label(norm)} (ε\u00a0=\u00a0{', '.join(eps)})")
    described = [attack for r in results.values() for entry in r.suite.entries for attack in entry.attacks]
    attacks = list(dict.fromkeys(_attack_in_words(description) for description in described))
    random = any(result.suite.content.get("control") for result in results.values())
    return [
        (
            f"{listed(list(results))} {verb} on {' or '.join(str(n) for n in samples)} test samples{where} under "
            f"{listed(threats)}."
        ),
        f"Attacks: {listed(attacks)}{'; random perturbations of the same size as control' if random else ''}.",
        "A sample counts as robust only if it is right without an attack and no attack within the budget changed that.",
    ]


def facts(results: Results, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the few facts for the head of the page; what differs between the methods is joined."""
    found: dict[str, str] = {}
    for key in ("data", "model", "commit"):
        if isinstance(settings.get(key), str | int | float):
            found[key] = str(settings[key])
    if names := [str(result.meta["data"]) for result in results.values() if "data" in result.meta]:
        found.setdefault("data", _each(names))
    found["samples"] = _each(str(len(result.ids)) for result in results.values())
    found["suite"] = _each(f"{result.suite.name} ({result.suite.hash})" for result in results.values())
    for key in ("seed", "date"):
        if values := [str(result.meta[key]) for result in results.values() if key in result.meta]:
            found[key] = _each(value[:10] if key == "date" else value for value in values)
    return found


def _each(values: Any) -> str:
    return " / ".join(dict.fromkeys(values))


def alerts(results: Results) -> list[str]:
    """Say what makes the results of different methods hard to compare; empty if nothing does."""
    found = []
    pairs = list(results.items())
    first_name, first = pairs[0]
    for name, result in pairs[1:]:
        if result.suite.hash != first.suite.hash:
            found.append(
                f"{name} was attacked with suite {result.suite.name} ({result.suite.hash}), {first_name} with "
                f"{first.suite.name} ({first.suite.hash}): their figures are not comparable."
            )
        if not result.same_samples(first):
            found.append(
                f"{name} was measured on other samples than {first_name}: differences are not paired, their intervals "
                "are wide."
            )
    return found


def run_details(results: Results) -> list[tuple[str, dict[str, Any]]]:
    """Return headed groups of facts: each suite norm by norm, then the evaluations, per method only where they differ."""
    suites = {result.suite.hash: result.suite for result in results.values()}
    groups: list[tuple[str, dict[str, Any]]] = []
    for suite in suites.values():
        control = {"control": "random perturbations at every budget"} if suite.content.get("control") else {}
        groups.append((f"Attacks of suite {suite.name} ({suite.hash})", {**_attacks(suite), **control}))
    described = {name: {"samples": len(result.ids), **result.meta} for name, result in results.items()}
    for values in described.values():
        values.pop("costs", None)  # a table of their own
    for values in described.values():
        if str(values.get("estimator", "")) == "None":
            values["estimator"] = "none: the model's own gradient, through the training surrogate of spiking neurons"
    evaluation: dict[str, Any] = {}
    for key in dict.fromkeys(key for values in described.values() for key in values):
        found = {name: values[key] for name, values in described.items() if key in values}
        alike = len(found) == len(results) and all(value == next(iter(found.values())) for value in found.values())
        evaluation[key] = next(iter(found.values())) if alike else found
    return [*groups, ("Evaluation", evaluation)]


def _attacks(suite: SuiteRecord) -> dict[str, str]:
    """List what tried to break a sample, per norm, with the budgets at which the same list was used."""
    lists: dict[tuple[str, str], list[str]] = {}
    for entry in suite.entries:
        attacks = "; ".join(_attack(attack) for attack in entry.attacks)
        eps = f"{entry.eps} (headline)" if entry.headline else entry.eps
        lists.setdefault((norm_label(entry.norm), attacks), []).append(eps)
    return {f"{norm}, ε = {', '.join(eps)}": attacks for (norm, attacks), eps in lists.items()}


def _attack(description: Mapping[str, Any]) -> str:
    """Write an attack with all its settings as the suite spells them, e.g. ``pgd: steps=40, restarts=2``."""
    written = {k: f"({_attack(v)})" if k == "crafted" else v for k, v in description.items() if v is not None}
    return f"{written.pop('attack')}: {', '.join(f'{k}={v}' for k, v in written.items())}"


def _attack_in_words(description: Mapping[str, Any]) -> str:
    """Name an attack with its strength, e.g. ``PGD (40 steps, 2 restarts)``."""
    if "crafted" in description:
        return f"{_attack_in_words(description['crafted'])} crafted on the model {description['label']}"
    strength = []
    for one, key in (("step", "steps"), ("query", "queries"), ("restart", "restarts")):
        if count := description.get(key):
            strength.append(f"{count} {key if count != 1 else one}")
    name = str(description["attack"]).upper().replace("_", "-")
    return f"{name} ({', '.join(strength)})" if strength else name
