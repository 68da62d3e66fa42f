import base64
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from sg_lightning.evaluation import Check
from sg_lightning.metrics import gradient_sparsity
from sg_lightning.reporting import findings, write_report

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and collects attributes, text and table cells."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.attributes, self.text, self.rows, self.bold = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            if "best" in dict(attrs).get("class", ""):
                self.bold.append((len(self.rows) - 1, len(self.rows[-1]) - 1))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" not in self.stack:
            self.text.append(data)
        if "td" in self.stack or "th" in self.stack:
            self.rows[-1][-1] += data

    def all_text(self):
        return " ".join("".join(self.text).replace("\u00a0", " ").split())


@pytest.fixture(scope="module")
def gradient_metrics():
    torch.manual_seed(0)
    dense, sparse = torch.randn(60, 64), torch.randn(60, 64) ** 3 * 0.01
    return {"vanilla": gradient_sparsity(dense), "SR": gradient_sparsity(sparse)}


@pytest.fixture(scope="module")
def report(results, gradient_metrics, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "made" / "here"
    histories = {"vanilla": {"val/loss": [1.0, 0.5]}, "SR": {"val/loss": [1.2, 0.7]}}
    settings = {"data": "Digits", "command": "make <demo> & more", "methods": {"SR": {"weight": 0.01}}}
    path = write_report(
        results, out, title="A & B <script>alert(1)</script>", settings=settings, gradient_metrics=gradient_metrics,
        histories=histories,
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def page(report):
    return Page(report.read_text(encoding="utf-8"))


def test_the_folder_holds_the_page_and_its_figures_and_nothing_half_written(report):
    found = sorted(path.name for path in report.parent.iterdir())
    assert found == [
        "accuracy_curves.png", "examples_1_vanilla.png", "gradients.png", "norm_matrix.png", "report.html",
        "training.png", "union.png",
    ]  # fmt: skip
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in report.parent.glob("*.png"))


def test_the_page_is_self_contained(report, page):
    text = report.read_text(encoding="utf-8")
    for tag, key, value in page.attributes:
        if key in ("src", "href", "srcset", "data", "action", "poster"):
            assert value.startswith(("data:image/png;base64,", "#")), (tag, key, value[:60])
    assert {tag for tag, _, _ in page.attributes}.isdisjoint({"script", "link", "iframe", "object"})
    assert not re.search(r"@import|url\(|https?://", text)
    embedded = [base64.b64decode(v.split(",", 1)[1]) for _, k, v in page.attributes if k == "src"]
    assert sorted(embedded) == sorted(p.read_bytes() for p in report.parent.glob("*.png"))
    anchors = {value for _, key, value in page.attributes if key == "id"}
    assert {value[1:] for _, key, value in page.attributes if key == "href"} <= anchors


def test_the_page_serves_phones_dark_screens_paper_and_screen_readers(report, page):
    text = report.read_text(encoding="utf-8")
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    images = sum(tag == "img" and key == "src" for tag, key, _ in page.attributes)
    assert sum(tag == "img" and key == "alt" and len(value) > 20 for tag, key, value in page.attributes) == images


def test_strings_of_the_user_are_escaped(report, page):
    text = report.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "A & B <script>alert(1)</script>" in page.all_text()
    assert "make <demo> & more" in page.all_text()


def test_names_of_methods_and_checks_are_escaped(make_result, truth, tmp_path):
    right = {norm: truth["SR"][norm] for norm in ("linf", "l2")}
    result = make_result(truth["SR"]["clean"], right)
    result.checks = [Check("a<b", "fail", "<i>&</i>", "l2")]
    path = write_report({"<b>x</b>": result, "y&z": result}, tmp_path)
    text = path.read_text(encoding="utf-8")
    assert "<b>x" not in text
    assert "<i>" not in text
    assert "a<b" in Page(text).all_text()


def test_the_table_holds_the_accuracies_and_the_best_is_bold(page, truth):
    norms = ("linf", "l2", "l1", "l0")
    header = next(i for i, row in enumerate(page.rows) if row[0] == "method")
    columns = {}
    for i, name in enumerate(truth):
        row = page.rows[header + 1 + i]
        assert row[0] == name
        right = truth[name]
        union = np.logical_and.reduce([right[norm] for norm in norms]).mean()
        shares = [right["clean"].mean(), *(right[n].mean() for n in norms), min(right[n].mean() for n in norms), union]
        for j, share in enumerate(shares):
            assert row[1 + j].replace("\u00a0", " ").startswith(f"{100 * share:.1f} %")
            columns.setdefault(j, []).append(share)
    best = {(header + 1 + i, 1 + j) for j, shares in columns.items() for i, s in enumerate(shares) if s == max(shares)}
    assert {cell for cell in page.bold if header < cell[0] <= header + len(truth)} == best


def test_a_failed_check_is_shown_with_its_reason_and_marks_its_figures(page, results):
    text = page.all_text()
    (failed,) = [check for check in results["SR"].checks if check.status != "pass"]
    assert failed.norm == "l2"
    assert f"SR, {failed.name}, L2: {failed.detail}" in text
    assert f"SR: {failed.name} (fail): {failed.detail}" in text
    total = sum(len(result.checks) for result in results.values())
    assert f"1 of {total} failed and 0 gave a warning" in text
    assert f"{total - 1} passed: what was seen" in text
    assert "Some figures need care" in text
    header = next(i for i, row in enumerate(page.rows) if row[0] == "method")
    row = page.rows[header + 2]
    assert row[0] == "SR"
    assert ["✕" in cell for cell in row[1:]] == [False, False, True, False, False, False, True]  # l2 and the union


def test_the_page_says_what_was_run(page, results):
    text = page.all_text()
    result = results["SR"]
    samples = len(result.ids)
    assert (
        f"were attacked, each on its own, on {samples} test samples of Digits under L∞ (ε = 1/16, 2/16, 3/16)" in text
    )
    for word in (
        result.suite.name,
        result.suite.hash,
        "PGD (40 steps, 2 restarts)",
        "pgd: steps=40, restarts=2",
        "SR: weight 0.01",
        "seed",
        "2026-01-02",
        "torch: 2.13.0",
    ):
        assert word in text


def test_findings_state_a_gain_with_its_interval_and_the_clean_cost(results):
    found = {finding.title: " ".join(finding.sentences) for finding in findings.find(results, "vanilla")}
    text = found["AT compared with vanilla"].replace("\u00a0", " ")
    # 20 % and 65 % of the samples by construction; the interval is the paired one.
    assert text.startswith("AT raises L∞ (ε = 2/16) accuracy from 20.0 % to 65.0 % (+45.0 points [+")
    assert "at a clean cost of 1.0 points" in text
    assert "L2 (ε = 0.5)" in text


def test_findings_are_as_plain_when_the_method_loses(results):
    found = {finding.title: " ".join(finding.sentences) for finding in findings.find(results, "AT")}
    text = found["vanilla compared with AT"].replace("\u00a0", " ")
    assert text.startswith("vanilla lowers L∞ (ε = 2/16) accuracy from 65.0 % to 20.0 % (−45.0 points [−")
    assert "Also clearly lower" in text
    assert "higher" not in text
    assert "at a clean gain of 1.0 points" in text


def test_findings_say_when_nothing_can_be_told_apart(results):
    twin = {"vanilla": results["SR"], "copy": results["SR"]}
    found = {finding.title: " ".join(finding.sentences) for finding in findings.find(twin, "vanilla")}
    text = found["copy compared with vanilla"]
    assert "shows no clear change under any single norm" in text
    assert "clean accuracy unchanged" in text
    assert "No clear difference" in text
    assert "clearly" not in text
    assert "leaves just as much; which is better stays open" in found["All norms at once"]


def test_findings_on_gradients_compare_medians(results, gradient_metrics):
    found = {f.title: " ".join(f.sentences) for f in findings.find(results, "vanilla", gradient_metrics)}
    ratio = float(gradient_metrics["SR"]["l1"].median() / gradient_metrics["vanilla"]["l1"].median())
    assert ratio < 0.1
    assert "SR: the gradient is smaller" in found["Input gradients"]
    assert "and sparser" in found["Input gradients"]
    swapped = {"vanilla": gradient_metrics["SR"], "SR": gradient_metrics["vanilla"]}
    text = {f.title: " ".join(f.sentences) for f in findings.find(results, "vanilla", swapped)}["Input gradients"]
    assert "SR: the gradient is larger" in text
    assert "and denser" in text


def test_findings_on_gradients_say_when_median_and_mean_disagree(results):
    g = torch.ones(11, 16)
    tail = g.clone() * torch.tensor([0.1] * 10 + [100.0])[:, None]  # most are smaller, one is huge
    metrics = {"vanilla": gradient_sparsity(tail), "SR": gradient_sparsity(g)}
    found = {f.title: " ".join(f.sentences) for f in findings.find(results, "vanilla", metrics)}
    assert "SR: the gradient is larger for the typical sample, smaller on average" in found["Input gradients"]
    assert "10 times that of vanilla in the median, 0.11 times in the mean" in found["Input gradients"]
    assert "about as sparse" in found["Input gradients"]


def test_a_network_without_gradients_is_named_and_does_not_stop_the_report(results, gradient_metrics, tmp_path):
    dead = {"vanilla": gradient_metrics["vanilla"], "SR": gradient_sparsity(torch.zeros(60, 64))}
    text = Page(write_report(results, tmp_path, gradient_metrics=dead).read_text(encoding="utf-8")).all_text()
    assert "every gradient of SR is zero or not finite" in text
    assert (tmp_path / "gradients.png").exists()
    only = {"SR": dead["SR"]}
    write_report(results, tmp_path / "none", gradient_metrics=only)
    assert not (tmp_path / "none" / "gradients.png").exists()


def test_one_method_alone_is_reported_without_comparisons(results, tmp_path):
    text = Page(write_report({"AT": results["AT"]}, tmp_path).read_text(encoding="utf-8")).all_text()
    assert "compared with" not in text
    assert "An attacker who may choose" in text
    assert "The best of each column" not in text


def test_results_of_different_suites_raise_an_alert(results, make_result, truth, tmp_path):
    norms = ("linf", "l2", "l1", "l0")
    other = make_result(truth["SR"]["clean"], {n: truth["SR"][n] for n in norms}, steps=99, first_id=500)
    path = write_report({"vanilla": results["vanilla"], "SR": other}, tmp_path)
    text = Page(path.read_text(encoding="utf-8")).all_text()
    assert "their figures are not comparable" in text
    assert "differences are not paired" in text


def test_bad_input_is_refused_in_one_sentence(results, tmp_path):
    with pytest.raises(ValueError, match="results is empty"):
        write_report({}, tmp_path)
    with pytest.raises(ValueError, match="baseline 'x' is not among"):
        write_report(results, tmp_path, baseline="x")
    with pytest.raises(ValueError, match="names of the methods"):
        write_report({"": results["SR"]}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_before_drawing(results, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setattr("sg_lightning.reporting.plots.norm_matrix", lambda *_: pytest.fail("drawn too early"))
    with pytest.raises(OSError, match="choose another out_dir"):
        write_report(results, blocked / "inside")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(results, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="cannot write the report"):
        write_report(results, tmp_path)


def test_a_crash_while_writing_leaves_the_old_page_whole(results, tmp_path, monkeypatch):
    path = write_report({"AT": results["AT"]}, tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report({"SR": results["SR"]}, tmp_path)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*"))
