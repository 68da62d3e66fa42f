"""The HTML of a report, from numbers, sentences and rendered figures. Whatever comes from outside is escaped."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from sg_lightning._version import __version__
from sg_lightning.evaluation import RobustnessResult, Share
from sg_lightning.reporting import effort, provenance, summary
from sg_lightning.reporting.findings import Finding
from sg_lightning.reporting.style import DPI, norm_label, percent, points
from sg_lightning.reporting.summary import Column, Results
from sg_lightning.threats import is_relaxed

MARKS = {"warn": ("!", "warning"), "fail": ("✕", "failed"), "pass": ("✓", "passed")}


@dataclass(frozen=True)
class Picture:
    """A rendered figure: its file name without ending, the section it belongs to, what it shows, how to read it."""

    stem: str
    section: str
    alt: str
    caption: str
    content: bytes

    @property
    def kind(self) -> str:
        """``png`` or ``gif``, the ending of its file."""
        return "gif" if self.content.startswith(b"GIF8") else "png"


@dataclass(frozen=True)
class Section:
    """One card of the page; ``body`` is HTML."""

    anchor: str
    title: str
    body: str


def render(
    title: str,
    results: Results,
    baseline: str,
    found: Sequence[Finding],
    pictures: Sequence[Picture],
    settings: Mapping[str, Any],
) -> str:
    """Put the page together."""
    sections = [
        Section("findings", "What was found", _findings(found)),
        Section("accuracies", "Accuracies", _accuracies(results) + _pictures(pictures, "accuracies")),
        Section("curves", "Accuracy over the size of the perturbation", _pictures(pictures, "curves")),
        Section("examples", "Examples", _pictures(pictures, "examples")),
        Section("gradients", "Input gradients", _pictures(pictures, "gradients")),
        Section("training", "Training", _pictures(pictures, "training")),
        Section("checks", "Honesty checks", _checks(results)),
        Section("effort", "Which attack broke what", effort.table(results)),
        Section(
            "reading",
            "How to read this",
            _reading(results, baseline, gradients=any(p.section == "gradients" for p in pictures)),
        ),
        Section("run", "What was run", _run(results, settings)),
    ]
    sections = [section for section in sections if section.body]
    template = Template((files("sg_lightning.reporting") / "template.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title),
        version=escape(__version__),
        lead=escape(" ".join(provenance.in_words(results, settings))),
        facts="".join(
            f"<li><b>{escape(k)}</b> {escape(v)}</li>" for k, v in provenance.facts(results, settings).items()
        ),
        alerts="".join(f'<p class="alert">{escape(text)}</p>' for text in provenance.alerts(results)),
        contents="".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in sections),
        sections="\n".join(
            f'<section id="{s.anchor}" aria-labelledby="{s.anchor}-title">'
            f'<h2 id="{s.anchor}-title">{escape(s.title)}</h2>\n{s.body}\n</section>'
            for s in sections
        ),
    )


def _findings(found: Sequence[Finding]) -> str:
    cards = []
    for finding in found:
        text = "".join(f"<p>{escape(sentence)}</p>" for sentence in finding.sentences)
        cards.append(
            f'<div class="finding{" care" if finding.care else ""}"><h3>{escape(finding.title)}</h3>{text}</div>'
        )
    note = "Computed from the numbers below. Square brackets hold 95 % intervals, of changes in percentage points."
    return f'<p class="soft">{note}</p><div class="findings">{"".join(cards)}</div>'


def _pictures(pictures: Iterable[Picture], section: str) -> str:
    return "".join(_figure(picture) for picture in pictures if picture.section == section)


def _figure(picture: Picture) -> str:
    """Embed a figure at its natural size; a smaller screen shrinks it."""
    if picture.kind == "gif":
        width, height = struct.unpack("<HH", picture.content[6:10])
    else:
        width, height = (round(pixels * 100 / DPI) for pixels in struct.unpack(">II", picture.content[16:24]))
    data = base64.b64encode(picture.content).decode()
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    return (
        f'<figure><img width="{width}" height="{height}" alt="{escape(picture.alt)}" '
        f'src="data:image/{picture.kind};base64,{data}">{caption}</figure>'
    )


def _accuracies(results: Results) -> str:
    """Make the table of robust accuracies and, below it, the one of the random control."""
    columns = summary.columns(results)
    norms = [column for column in columns if column.key in summary.norms(results)]
    robust = {name: [summary.cell(result, c.key) for c in columns] for name, result in results.items()}
    random = {name: [summary.control(result, c.key) for c in norms] for name, result in results.items()}
    marks = {(name, c.key): summary.worst_status(r, c.key) for name, r in results.items() for c in columns}
    legend = (
        "Percent of samples that are right, over all samples, with the 95 % interval below. "
        + ("The best of each column is bold. " if len(results) > 1 else "")
        + "Weakest norm: the lowest of the norms. Union: right under every norm at once, sample by sample."
    )
    if any(is_relaxed(column.key) for column in norms):
        legend += (
            " Relaxed (infeasible): values between whole events, which no sensor can produce; a diagnostic that enters "
            "neither weakest norm nor union."
        )
    used = {status for status in marks.values() if status != "pass"}
    for status in sorted(used):
        legend += f" {MARKS[status][0]} an honesty check {'failed' if status == 'fail' else 'warned'} for this figure."
    return (
        f'<p class="soft">{escape(legend)}</p>'
        + _numbers(columns, robust, marks)
        + "<h3>Control: random perturbations of the same size</h3>"
        '<p class="soft">The same budgets, filled without any knowledge of the network. The line below each figure is '
        "its distance to the attacks: what knowing the network adds.</p>"
        + _numbers(norms, random, {}, {n: [_gap(r, c) for c in norms] for n, r in results.items()})
    )


def _gap(result: RobustnessResult, column: Column) -> str:
    random, attacked = summary.control(result, column.key), summary.cell(result, column.key)
    return "" if random is None or attacked is None else f"{points(random.value - attacked.value)} points"


def _numbers(
    columns: Sequence[Column],
    rows: Mapping[str, Sequence[Share | None]],
    marks: Mapping[tuple[str, str], str],
    notes: Mapping[str, Sequence[str]] | None = None,
) -> str:
    head = "".join(
        f'<th scope="col">{escape(c.label)}'
        + (f"<small>ε\u00a0=\u00a0{escape(c.eps)}</small>" if c.eps else "")
        + "</th>"
        for c in columns
    )
    best = [
        max((s.value for s in column if s is not None), default=None) for column in zip(*rows.values(), strict=True)
    ]
    body = []
    for name, shares in rows.items():
        cells = []
        for j, (column, share) in enumerate(zip(columns, shares, strict=True)):
            if share is None:
                cells.append("<td>–</td>")
                continue
            kinds = ["derived"] if column.key in ("min", "union") else []
            kinds += ["best"] if notes is None and len(rows) > 1 and share.value == best[j] else []
            status = marks.get((name, column.key), "pass")
            mark = (
                ""
                if status == "pass"
                else f'<sup class="mark {status}" title="{MARKS[status][1]}">{MARKS[status][0]}</sup>'
            )
            note = notes[name][j] if notes is not None else f"{100 * share.low:.1f}–{100 * share.high:.1f}"
            cells.append(
                f'<td class="{" ".join(kinds)}"><span class="value">{percent(share.value)}{mark}</span>'
                f"<small>{escape(note)}</small></td>"
            )
        body.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll"><table class="numbers"><thead><tr><th scope="col">method</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _checks(results: Results) -> str:
    """Make a table of checks by method with a badge per norm; then the reasons, those of passed ones folded away."""
    listed = [(name, check) for name, result in results.items() for check in result.checks]
    if not listed:
        return "<p>No honesty checks were run with these evaluations.</p>"
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in results)
    body = []
    for title in dict.fromkeys(check.name for _, check in listed):
        row = ""
        for result in results.values():
            found = [check for check in result.checks if check.name == title]
            badges = " ".join(_badge(c.status, norm_label(c.norm) if c.norm else "", c.detail) for c in found)
            row += f"<td>{badges or '–'}</td>"
        body.append(f'<tr><th scope="row">{escape(title)}</th>{row}</tr>')
    bad = sorted((item for item in listed if item[1].status != "pass"), key=lambda item: item[1].status)  # fail first
    good = [item for item in listed if item[1].status == "pass"]
    page = (
        '<p class="soft">Signs that an attack was too weak, so that a network looks more robust than it is. They can '
        "convict a figure; they cannot acquit it.</p>"
        f'<div class="scroll"><table class="left"><thead><tr><th scope="col">check</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
    if bad:
        page += f"<h3>Failed and warning</h3><ul>{_reasons(bad)}</ul>"
    if good:
        page += f"<details><summary>{len(good)} passed: what was seen</summary><ul>{_reasons(good)}</ul></details>"
    return page


def _reasons(listed: Sequence[tuple[str, Any]]) -> str:
    return "".join(
        f"<li>{_badge(check.status)} {escape(', '.join(filter(None, _about(name, check))))}: {escape(check.detail)}</li>"
        for name, check in listed
    )


def _about(name: str, check: Any) -> tuple[str, ...]:
    return name, check.name, norm_label(check.norm) if check.norm else ""


def _badge(status: str, text: str = "", detail: str = "") -> str:
    symbol, word = MARKS[status]
    hint = f"{word}: {detail}" if detail else word
    return f'<span class="badge {status}" title="{escape(hint)}">{symbol} {escape(text or word)}</span>'


def _reading(results: Results, baseline: str, *, gradients: bool) -> str:
    several = len(results) > 1
    items = [
        (
            "Robust accuracy is the share of all samples that the network gets right and that no attack of the suite could "
            "change within the budget ε. Samples that are wrong without any attack count as not robust. It is an upper "
            "bound: a stronger attack can only lower it."
        ),
        (
            "The norm says what the attacker may do. L∞: change every input a little; L2: a total change measured as a "
            "distance; L1: a total amount of change; L0: change few inputs, but those at will; "
            "flips: add or delete single events; retiming: move spikes in time. A defence against one of them need not help "
            "against another."
        ),
        "The union asks for a right answer under every norm at once. It is the figure to trust if the attacker is free.",
        (
            "Random perturbations of the same size are the control. If they hurt as much as the attacks, the attacks are "
            "weak, or the budget alone destroys the input."
        ),
        (
            "Intervals are 95 % and cover the choice of the test samples only. They do not cover the randomness of training: "
            "another seed can move a figure by more than its interval. Of many comparisons, about one in twenty crosses its "
            "interval by chance."
        ),
    ]
    if gradients:
        items.append(
            "A smaller input gradient (‖g‖₂) means less first-order damage in every norm. Sparser at equal ‖g‖₂ means, to "
            "first order, less under L∞, no change under L2 and more under L1 and L0: a prediction to hold against the "
            "figures, not a finding."
        )
    if several:
        items.insert(
            4,
            f"Differences are measured against {baseline}. Where both saw the same samples they are paired, so their "
            "intervals are narrower than a comparison of two intervals suggests. A change is called clear if its interval "
            "does not include zero.",
        )
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def _run(results: Results, settings: Mapping[str, Any]) -> str:
    groups = [("Given by the caller", settings)] if settings else []
    groups += provenance.run_details(results)
    return "".join(f'<h3>{escape(heading)}</h3><dl class="run">{_entries(values)}</dl>' for heading, values in groups)


def _entries(values: Mapping[str, Any]) -> str:
    return "".join(f"<dt>{escape(_words(key))}</dt><dd>{_value(value)}</dd>" for key, value in values.items())


def _value(value: Any) -> str:
    """Write a setting: a mapping as a list, with what is deeper inside it on one line; the rest as text."""
    if isinstance(value, Mapping):
        return "<ul>" + "".join(f"<li>{escape(str(k))}: {escape(_inline(v))}</li>" for k, v in value.items()) + "</ul>"
    return escape(_inline(value))


def _words(key: Any) -> str:
    return str(key).replace("_", " ")


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(key)} {_inline(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_inline(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
