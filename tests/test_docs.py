"""What the documents show runs, and the tables they hold are the measured ones."""

import re
from pathlib import Path

import pytest
import torch

from sg_lightning.attacks import ATTACKS
from sg_lightning.backbones import ConvNet
from sg_lightning.datamodules import Digits
from sg_lightning.neurons import LIF

ROOT = Path(__file__).parent.parent


def blocks(libraries):
    """Return the Python blocks of docs/attacks.md: without those that need foreign libraries, or with them."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "attacks.md").read_text(encoding="utf-8"), re.DOTALL)
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


@pytest.mark.adapters
def test_adapter_examples_run():
    run(blocks(libraries=True))


def test_attack_table_is_the_measured_one():
    text = (ROOT / "docs" / "attacks.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- begin: (\S+) -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert (ROOT / table[1]).read_text(encoding="utf-8") == table[2]
    assert "| PGD-10 L∞ | sg_lightning |" in table[2]
