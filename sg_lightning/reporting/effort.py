"""Which attack broke how many samples, and what it cost, as a table of the page."""

from __future__ import annotations

from html import escape

from sg_lightning.evaluation import RobustnessResult
from sg_lightning.reporting.style import norm_label
from sg_lightning.reporting.summary import Results


def table(results: Results) -> str:
    """Return one row per norm and attack: samples it was first to break within the headline budget, and its cost."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in results)
    body = []
    for norm in dict.fromkeys(norm for result in results.values() for norm in result.norms):
        listed = [attack for result in results.values() if norm in result.norms for attack in _attacks(result, norm)]
        for attack in dict.fromkeys(listed):
            cells = "".join(f"<td>{_cell(result, norm, attack)}</td>" for result in results.values())
            body.append(f'<tr><th scope="row">{escape(norm_label(norm))}</th><td>{escape(attack)}</td>{cells}</tr>')
    return (
        '<p class="soft">Attacks from cheap to dear, each on the samples that those before it left standing. Large: how '
        "many it was the first to break, within the headline budget and below. Small: input gradients per sample that it "
        "attacked, and seconds at all budgets together.</p>"
        '<div class="scroll"><table class="numbers"><thead><tr><th scope="col">norm</th><th scope="col">attack</th>'
        f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _attacks(result: RobustnessResult, norm: str) -> list[str]:
    names = [name for entry in result.suite.entries if entry.norm == norm for name in entry.names]
    return list(dict.fromkeys(names))


def _cell(result: RobustnessResult, norm: str, attack: str) -> str:
    if norm not in result.norms or attack not in _attacks(result, norm):
        return "–"
    rows = [
        r for r in result.rows if r.phase == "main" and (r.norm, r.attack) == (norm, attack) and r.status != "skipped"
    ]
    gradients = sum(row.gradients for row in rows) / len(rows) if rows else 0.0
    costs = result.meta.get("costs", {})
    keys = [f"{norm} {eps} {attack}" for eps in result.budgets(norm)]
    seconds = sum(costs[key]["seconds"] for key in keys if key in costs)
    note = f"{gradients:.1f} gradients" + (f", {seconds:.1f} s" if seconds else "") if rows else "nothing left"
    return f'<span class="value">{result.broken_by(norm).get(attack, 0)}</span><small>{note}</small>'
