"""What the documents show runs, and the tables they hold are the measured ones."""

import re
from pathlib import Path

import pytest
import torch

from sg_lightning import datamodules
from sg_lightning.attacks import ATTACKS, ESTIMATORS, suite_names
from sg_lightning.attacks.adapters.advertorch import REFUSED
from sg_lightning.backbones import ConvNet
from sg_lightning.datamodules import Digits
from sg_lightning.neurons import LIF

ROOT = Path(__file__).parent.parent


def python_of(name):
    """Return the Python blocks of a document."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(encoding="utf-8"), re.DOTALL)


def blocks(libraries):
    """Return the Python blocks of docs/attacks.md: without those that need foreign libraries, or with them."""
    found = python_of("attacks.md")
    return [code for code in found if libraries or "Torchattacks" not in code]


def run(code):
    data = Digits()
    data.setup("test")
    pairs = [data.test_dataloader().dataset[i] for i in range(8)]
    model, x = (
        ConvNet(channels=(8, 16), hidden=32, neuron=LIF(threshold=0.1)).eval(),
        torch.stack([x for x, _ in pairs]),
    )
    names = {"model": model, "x": x, "y": model(x).argmax(1)}
    try:
        for block in code:
            exec(compile(block, "docs/attacks.md", "exec"), names)  # noqa: S102 - our own document
    finally:
        ATTACKS.pop("corners", None)
    return names


def test_attack_examples_run():
    assert run(blocks(libraries=False))["result"].success.shape == (8,)


def test_examples_of_modalities_run(capsys):
    names = {}
    for block in python_of("modalities.md"):
        exec(compile(block, "docs/modalities.md", "exec"), names)  # noqa: S102 - our own document
    assert names["attacked"].shape == (2, 1600)
    assert set(names["heard"]) == {"audio"}
    assert torch.equal(names["both"]["events"], names["x"]["events"])
    assert not torch.equal(names["together"]["events"], names["x"]["events"])
    assert names["result"].norms == ["audio_flips"]
    assert "torch.Size([64, 25, 70]) Counts" in capsys.readouterr().out


def shown(budget):
    """Write the budgets as the table of the document does."""
    share = str(budget.headline).endswith("%")
    numbers = [str(eps).removesuffix("%") for eps in budget.eps]
    headline = str(budget.headline).removesuffix("%")
    return ", ".join(f"**{n}**" if n == headline else n for n in numbers) + " %" * share


def test_tables_of_modalities_are_those_of_the_data_sets():
    text = (ROOT / "docs" / "modalities.md").read_text(encoding="utf-8")
    columns = [
        [datamodules.NMNIST(), datamodules.DVSGesture(), datamodules.CIFAR10DVS(), datamodules.NCaltech101()],
        [datamodules.SaccadeDigits()],
        [datamodules.SHD(), datamodules.SSC()],
        [datamodules.SpokenDigits()],
    ]
    for norm in ("flips", "retime_inf", "retime_0", "retime_1"):
        row = re.search(rf"^\| `{norm}` \| [^|]+ \|(.*)\|$", text, re.MULTILINE)[1].split("|")
        for cell, sets in zip(row, columns, strict=True):
            assert {shown(data.budgets[norm]) if norm in data.budgets else "" for data in sets} == {cell.strip()}
    for data in (data for sets in columns for data in sets):
        (row,) = re.findall(rf"^\| `{type(data).__name__}` \|.*$", text, re.MULTILINE)
        assert f"| {data.input_shape} |" in row


def test_performance_examples_run(capsys):
    for code in python_of("performance.md"):
        exec(compile(code, "docs/performance.md", "exec"), {})  # noqa: S102 - our own document
    assert "eager" in capsys.readouterr().out


def test_every_result_that_a_document_links_to_is_there():
    for path in (ROOT / "docs").glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.adapters
def test_adapter_examples_run():
    run(blocks(libraries=True))


@pytest.mark.parametrize(
    ("path", "row"),
    [
        ("benchmarks/results/attacks.md", "| APGD-100 L∞ CE | sg_lightning |"),
        ("benchmarks/results/cascade.md", "| cascade |"),
    ],
)
def test_tables_are_the_measured_ones(path, row):
    text = (ROOT / "docs" / "attacks.md").read_text(encoding="utf-8")
    table = re.search(rf"<!-- begin: {path} -->\n(.*?)<!-- end -->", text, re.DOTALL)[1]
    assert (ROOT / path).read_text(encoding="utf-8") == table
    assert row in table


def test_every_suite_estimator_and_refusal_is_documented():
    text = (ROOT / "docs" / "attacks.md").read_text(encoding="utf-8")
    for name in (*suite_names(), *(name for name in ESTIMATORS if name != "bptt")):
        assert f"| `{name}` |" in text
    for attack in ATTACKS.values():
        assert attack.__name__ in text, attack
    for name in REFUSED:
        assert name in text, name
