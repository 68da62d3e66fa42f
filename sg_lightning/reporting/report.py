"""Write everything about a set of evaluations into one folder: figures as PNG and one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sg_lightning.reporting import plots, style, summary
from sg_lightning.reporting.animation import animation
from sg_lightning.reporting.findings import find
from sg_lightning.reporting.page import Picture, render
from sg_lightning.reporting.pictures import examples_figure
from sg_lightning.reporting.summary import Results
from sg_lightning.reporting.training import (
    GradientMetrics,
    Histories,
    gradient_sparsity_figure,
    measured,
    training_curves,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(
    results: Results,
    out_dir: str | Path,
    *,
    title: str = "Robustness report",
    baseline: str | None = None,
    settings: Mapping[str, Any] | None = None,
    gradient_metrics: GradientMetrics | None = None,
    histories: Histories | None = None,
) -> Path:
    """Write ``report.html`` and its figures as PNG files.

    The page needs no other file and no network. Its sentences are computed from the numbers, whichever way they fall.

    Args:
        results: One result per method, by name, in the order of the tables. Results are comparable only if they come
            from the same samples and the same suite; the report says so where they do not.
        out_dir: Folder to write to; made if it does not exist. Files of the same name are replaced.
        title: Heading of the page.
        baseline: The method that others are compared with; by default the one called ``vanilla``, else the first.
        settings: What else the reader should know, e.g. ``{"data": "Digits", "command": "make demo", "commit":
            "1a2b3c"}``; values may be mappings. Shown as given.
        gradient_metrics: Per method what :func:`~sg_lightning.objectives.input_gradient_metrics` returned.
        histories: Per method, per logged name, one number per epoch.

    Returns:
        The path of ``report.html``.

    Raises:
        ValueError: ``results`` is empty, or ``baseline`` is not among them.
        ImportError: matplotlib is not installed.
        OSError: ``out_dir`` cannot be made or written to; checked before the figures are drawn.
    """
    summary.check_results(results)
    reference = summary.choose_baseline(results, baseline)
    out = _writable(Path(out_dir))
    found = find(results, reference, gradient_metrics)

    pictures = [
        _picture("norm_matrix", "accuracies", plots.norm_matrix(results), *_MATRIX),
        _picture("union", "accuracies", plots.union_bars(results), *_UNION),
        _picture("accuracy_curves", "curves", plots.accuracy_curves(results), *_CURVES),
    ]
    kept = [name for name, result in results.items() if result.examples]
    for i, name in enumerate(kept):
        alt = f"Clean and adversarial inputs of {name}, and their differences, for each norm"
        caption = _EXAMPLES if name == kept[-1] else ""
        figure = examples_figure(results[name], name)
        pictures.append(_picture(f"examples_{i + 1}_{_slug(name)}", "examples", figure, alt, caption))
        moving = animation(results[name])
        if moving is not None:
            stem = f"animation_{i + 1}_{_slug(name)}"
            alt = f"An event sample of {name} over time: clean, adversarial, and the events that changed"
            pictures.append(Picture(stem, "examples", alt, f"{name}. {_ANIMATION}", moving))
    if gradient_metrics and any(measured(metrics, "l1").size for metrics in gradient_metrics.values()):
        pictures.append(_picture("gradients", "gradients", gradient_sparsity_figure(gradient_metrics), *_GRADIENTS))
    if histories:
        pictures.append(_picture("training", "training", training_curves(histories), *_TRAINING))

    page = render(title, results, reference, found, pictures, settings or {})
    for picture in pictures:
        style.write_atomically(out / f"{picture.stem}.{picture.kind}", picture.content)
    path = out / "report.html"
    style.write_atomically(path, page.encode())  # last: a page that exists has all its figures beside it
    return path


def _picture(stem: str, section: str, figure: Figure, alt: str, caption: str) -> Picture:
    return Picture(stem, section, alt, caption, style.to_png(figure))


def _writable(out: Path) -> Path:
    """Make the folder and prove that it can be written to, before minutes of drawing are spent."""
    probe = out / ".write-test"
    try:
        out.mkdir(parents=True, exist_ok=True)
        style.write_atomically(probe, b"")
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write the report to {out}: {error.strerror or error}; choose another out_dir") from error
    return out


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() and c.isascii() else "_" for c in name.lower())[:40]


_MATRIX = (
    "Table of accuracies: one row per method, one column per norm, coloured from light (0 %) to dark (100 %)",
    (
        "Accuracy in percent at the headline budgets; the best of each column is bold. The last two columns are derived "
        "from the norms."
    ),
)
_UNION = (
    "Bars of union accuracy per method with 95 % intervals, beside weakest-norm and clean accuracy",
    (
        "What is left when the attacker may choose the norm for every sample (bar, with its number on the right), when the "
        "same single norm is used for all samples (circle), and without an attack (diamond)."
    ),
)
_CURVES = (
    "Accuracy over the size of the perturbation, one panel per norm, one line per method",
    (
        "Solid lines: the worst case over all attacks of the suite, with 95 % Wilson intervals. Dashed lines: random "
        "perturbations of the same size. Budgets of different norms are not comparable with each other."
    ),
)
_EXAMPLES = (
    "What an attack needs to change. Labels give the true class, then what the network says; the size is in the unit "
    "of the norm. Differences of images are amplified as stated: red is added and blue taken away; those of colour images "
    "lie around mid-grey. Spikes and events that were added are marked red, those taken away blue, and counted; pixels "
    "of event frames that gained and lost events at different times are purple. Event frames are summed over time, red where "
    "brighter and blue where darker events prevail, on the scale of the clean ones; rasters have time to the right and "
    "channels upwards, averaged over small blocks."
)
_ANIMATION = "Step by step: clean events, adversarial events, and what changed. Dark: on, pale: off, red: added, blue: taken away."
_GRADIENTS = (
    "Distributions over samples of the size and the sparsity of the input gradient, one row per method",
    (
        "Gradient of the true class's probability at the clean input, through the surrogate of the spiking neurons. Each "
        "shape is the distribution over samples, the bar its middle half, the dot and the number the median. Zero gradients "
        "have no sparsity and are left out."
    ),
)
_TRAINING = (
    "Logged quantities over the epochs, one panel per quantity, one line per method",
    "As logged during training, one point per epoch.",
)
