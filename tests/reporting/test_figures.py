import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sg_lightning import reporting
from sg_lightning.metrics import gradient_sparsity
from sg_lightning.reporting import pictures, style, summary

METHODS = ["vanilla", "SR", "AT"]
NORMS = ["linf", "l2", "l1", "l0"]


def labelled(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def test_curves_draw_the_numbers_of_the_results(results):
    figure = reporting.accuracy_curves(results)
    assert len(figure.axes) == 4
    for axes, norm in zip(figure.axes, NORMS, strict=True):
        assert axes.get_title(loc="left") == f"{style.norm_label(norm)} perturbations"
        lines = labelled(axes)
        for name in METHODS:
            eps, shares, *_ = zip(*results[name].curve(norm), strict=True)
            np.testing.assert_allclose(lines[name].get_xdata(), eps)
            np.testing.assert_allclose(lines[name].get_ydata(), np.multiply(shares, 100))
            control = lines[f"{name}, random"]
            assert control.is_dashed()
            np.testing.assert_allclose(control.get_ydata()[-1], 100 * results[name].random_accuracy(norm, eps[-1]))
        marks = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
        assert {float(line.get_xdata()[0]) for line in marks} == {
            float(eps) for eps, text in summary.budgets(results["SR"], norm).items()
            if text == summary.headline(results["SR"], norm)
        }  # fmt: skip
        assert [tick.get_text() for tick in axes.get_xticklabels()][1:] == list(
            summary.budgets(results["SR"], norm).values()
        )


def test_curve_bands_are_the_intervals(results):
    axes = reporting.accuracy_curves({"SR": results["SR"]}).axes[0]
    corners = axes.collections[0].get_paths()[0].vertices
    for eps, _, low, high in results["SR"].curve("linf"):
        there = corners[np.isclose(corners[:, 0], eps), 1]
        assert (there.min(), there.max()) == pytest.approx((100 * low, 100 * high))


def test_one_norm_and_one_method_make_one_panel(make_result, truth):
    result = make_result(truth["SR"]["clean"], {"linf": truth["SR"]["linf"]})
    assert len(reporting.accuracy_curves({"only": result}).axes) == 1


def test_every_method_keeps_its_colour_and_marker_in_all_figures(results):
    look = style.looks(results)
    assert len({entry.colour for entry in look.values()}) == len({entry.marker for entry in look.values()}) == 3
    line = labelled(reporting.accuracy_curves(results).axes[0])["AT"]
    assert (line.get_color(), line.get_marker()) == look["AT"]
    bars = reporting.union_bars(results).axes[0].patches
    from matplotlib.colors import to_hex

    assert [to_hex(bar.get_facecolor()) for bar in bars] == [entry.colour for entry in look.values()]
    many = style.looks(map(str, range(16)))
    assert len(set(many.values())) == 16


def test_matrix_writes_every_accuracy_and_marks_the_best(results):
    axes = reporting.norm_matrix(results).axes[0]
    texts = {tuple(map(round, text.get_position())): text for text in axes.texts}
    columns = summary.columns(results)
    assert len(texts) == 3 * len(columns)
    for j, column in enumerate(columns):
        shares = [summary.cell(results[name], column.key).value for name in METHODS]
        for i, share in enumerate(shares):
            assert texts[j, i].get_text() == f"{100 * share:.1f}"
            assert (texts[j, i].get_fontweight() == "bold") == (share == max(shares))
    assert [tick.get_text() for tick in axes.get_yticklabels()] == METHODS
    assert axes.get_xticklabels()[1].get_text() == "L∞\nε = 2/16"


def test_matrix_breaks_the_names_of_modalities(results, monkeypatch):
    columns = summary.columns(results)
    long = dataclasses.replace(columns[1], label="audio: retiming B∞")
    monkeypatch.setattr(summary, "columns", lambda results: [columns[0], long, *columns[2:]])
    labels = reporting.norm_matrix(results).axes[0].get_xticklabels()
    assert labels[1].get_text() == "audio:\nretiming B∞\nε = 2/16"


def test_union_bars_are_as_long_as_the_union_and_carry_its_interval(results):
    axes = reporting.union_bars(results).axes[0]
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == pytest.approx([100 * results[name].union() for name in METHODS])
    texts = [text.get_text() for text in axes.texts]
    share = summary.cell(results["SR"], "union")
    assert f"{100 * share.low:.1f}–{100 * share.high:.1f}" in texts


def test_examples_show_clean_adversarial_and_amplified_difference(results):
    figure = reporting.examples_figure(results["vanilla"], "vanilla")
    shown = summary.examples(results["vanilla"])
    per_norm = min(pictures.PER_NORM, sum(e.norm == "linf" for e in shown))
    assert len(figure.axes) == 3 * per_norm * len({e.norm for e in shown})
    first = shown[0]
    clean, adversarial, difference = (np.asarray(axes.images[0].get_array()) for axes in figure.axes[:3])
    np.testing.assert_allclose(clean, first.clean[0], atol=1e-6)
    np.testing.assert_allclose(adversarial, first.adversarial[0], atol=1e-6)
    delta = (first.adversarial - first.clean)[0].numpy()
    np.testing.assert_allclose(difference, delta / np.abs(delta).max(), atol=1e-5)
    titles = [axes.get_title() for axes in figure.axes[:3]]
    assert titles[1] == f"adversarial\n{first.label} → {first.predicted}"
    assert f"×{1 / np.abs(delta).max():.2g}" in titles[2]


def test_differences_of_colour_images_are_amplified_around_grey_as_stated(make_result, truth):
    result = make_result(truth["SR"]["clean"], {"linf": truth["SR"]["linf"]})
    clean, change = torch.rand(3, 8, 8) * 0.5 + 0.25, torch.zeros(3, 8, 8)
    change[0, 2, 3], change[1, 4, 4] = 0.05, -0.02
    example = {"norm": "linf", "eps": "2/16", "label": 1, "predicted": 2, "size": 0.05}
    result.examples = [{**example, "clean": clean, "adversarial": clean + change}]
    axes = reporting.examples_figure(result).axes[2]
    shown = np.asarray(axes.images[0].get_array())
    assert "×10," in axes.get_title()
    np.testing.assert_allclose(shown, 0.5 + 10 * change.permute(1, 2, 0).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1, 8, 6), (8, 6)), ((3, 8, 6), (8, 6, 3)), ((2, 8, 6), (8, 6)), ((5, 2, 8, 6), (8, 6)), ((5, 9), (9, 5)), ((7,), (1, 7))],
)  # fmt: skip
def test_every_modality_becomes_a_plane(shape, expected):
    assert pictures.as_plane(torch.rand(shape)).shape == expected


def test_event_frames_are_summed_over_time_with_signed_polarity():
    frames = torch.zeros(4, 2, 3, 3)
    frames[:, 0, 1, 1] = 2  # on events in all four steps
    frames[2, 1, 0, 2] = 3  # off events in one
    plane = pictures.as_plane(frames)
    assert plane[1, 1] == 8
    assert plane[0, 2] == -3


def test_gradient_figure_shows_the_medians_and_counts_zero_gradients():
    g = torch.randn(40, 64)
    g[:4] = 0
    metrics = {"vanilla": gradient_sparsity(torch.randn(40, 64)), "SR": gradient_sparsity(g * 0.1)}
    figure = reporting.gradient_sparsity_figure(metrics)
    assert len(figure.axes) == 3
    assert figure.axes[0].get_yticklabels()[1].get_text() == "SR\n(4 of 40 left out)"
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    for panel, key in zip(texts, ("l1", "l1_over_l2", "hoyer"), strict=True):
        for text, measures, kept in zip(panel, metrics.values(), (slice(0, 40), slice(4, 40)), strict=True):
            assert float(text) == pytest.approx(np.median(measures[key][kept].numpy()), rel=6e-3)


def test_gradient_figure_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="is empty"):
        reporting.gradient_sparsity_figure({})
    with pytest.raises(ValueError, match="no finite, non-zero gradient"):
        reporting.gradient_sparsity_figure({"dead": gradient_sparsity(torch.zeros(3, 4))})
    with pytest.raises(ValueError, match=r"lacks \['hoyer'\]"):
        reporting.gradient_sparsity_figure({"partial": {k: torch.ones(3) for k in ("l1", "l1_over_l2")}})


def test_training_curves_draw_the_histories_and_skip_gaps():
    histories = {
        "vanilla": {"train/loss": [3.0, 2.0, 1.0], "val/loss": [3.5, float("nan"), 1.5], "val/acc": [0.1, 0.5, 0.9]},
        "SR": {"train/loss": [4.0, 3.0]},
    }
    figure = reporting.training_curves(histories)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss", "acc"]
    lines = labelled(figure.axes[0])
    np.testing.assert_allclose(lines["vanilla val/loss"].get_xydata(), [[1, 3.5], [3, 1.5]])
    np.testing.assert_allclose(lines["SR train/loss"].get_ydata(), [4, 3])
    assert lines["SR train/loss"].is_dashed()
    assert not lines["vanilla val/loss"].is_dashed()
    with pytest.raises(ValueError, match="no numbers"):
        reporting.training_curves({"vanilla": {"val/loss": [float("nan")]}})


def test_names_with_dollars_are_text_not_mathematics(results):
    figure = reporting.union_bars({r"cost $1 \frac $2": results["SR"]})
    assert reporting.to_png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("draw", ["accuracy_curves", "norm_matrix", "union_bars"])
def test_empty_results_are_refused(draw):
    with pytest.raises(ValueError, match="results is empty"):
        getattr(reporting, draw)({})
    with pytest.raises(TypeError, match="must be a RobustnessResult"):
        getattr(reporting, draw)({"vanilla": {"linf": 0.5}})


def test_without_matplotlib_one_sentence_says_how_to_get_it(results, monkeypatch):
    real = importlib.import_module

    def missing(name, *args):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    for draw in (reporting.accuracy_curves, reporting.norm_matrix, reporting.union_bars):
        with pytest.raises(ImportError, match=r"pip install 'sg-lightning\[report\]'") as caught:
            draw(results)
        assert str(caught.value).count("\n") == 0


def test_figures_leave_pyplot_and_its_settings_alone():
    code = """
import sys
import sg_lightning.reporting as reporting
assert "matplotlib" not in sys.modules, "importing the room must not import matplotlib"
assert "lightning" not in sys.modules
reporting.to_png(reporting.training_curves({"a": {"val/loss": [1.0, 0.5]}}))
import matplotlib
assert "matplotlib.pyplot" not in sys.modules
assert matplotlib.rcParams["axes.spines.top"]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
