"""In float64 the rows of a suite are the same, however the work is cut, dropped early, killed and resumed.

Several processes: tests/evaluation/test_adversarial_set.py, tests/callbacks/test_robustness.py and tests/test_cli.py.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sg_lightning.attacks import Attack
from sg_lightning.backbones import ConvNet
from sg_lightning.datamodules import Digits
from sg_lightning.evaluation import evaluate
from sg_lightning.evaluation.rows import read_rows
from sg_lightning.threats import Budget

SUITE = """
attacks:
  - {attack: pgd, steps: 4, restarts: 2}
  - {attack: apgd, steps: 5, estimators: [training, assg, hart], only: [linf, l2]}
  - {attack: sapgd, steps: 5, estimator: assg, only: [linf]}
  - {attack: square, queries: 12, only: [linf, l2]}
  - {attack: spgd, steps: 5, estimators: [training, hart], only: [l0]}
  - {attack: sparse_rs, queries: 12, only: [l0]}
"""
BUDGETS = {
    "linf": Budget(eps=("1/512", "1/256"), headline="1/256"),
    "l2": Budget(eps=(0.03,), headline=0.03),
    "l0": Budget(eps=(1,), headline=1),
}


class Net(ConvNet):
    """A small spiking convolutional network in float64, which counts its answers and may die at one of them."""

    calls, stop_at = 0, None

    def __init__(self):
        torch.manual_seed(1)
        super().__init__(channels=(4, 8), hidden=16, time_steps=3)
        self.double().eval()

    def forward(self, x):
        type(self).calls += 1
        if type(self).calls == self.stop_at:
            raise KeyboardInterrupt
        return super().forward(x)


@pytest.fixture(scope="module", params=[0, 100, 200])
def digits(request):
    # Loss ties that only rounding would break are met by some of these images, not by all.
    x = Digits().test_set.images[request.param : request.param + 24].double() / 16
    net = Net()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        net.train()(x)  # so that an untrained network fires
        net.eval()
        # Centred logits, so that it has several classes to tell apart.
        net.head.bias -= net(x).mean(0)
        y = net(x).argmax(1)
    y[::8] = (y[::8] + 1) % 10  # wrong to begin with
    return net, x, y


@pytest.fixture
def run(digits, tmp_path):
    path = tmp_path / "mixed.yaml"
    path.write_text(SUITE)
    net, x, y = digits

    def measure(**options):
        options = {"suite": path, "budgets": BUDGETS, "check_samples_count": 4, "progress": False, **options}
        return evaluate(net, (x, y), **options)

    return measure


def ordered(rows):
    return sorted((replace(row, size=round(row.size, 9)) for row in rows), key=repr)


def test_rows_are_identical(run, digits, tmp_path, monkeypatch):
    whole = run(batch_size=64)
    assert {row.status for row in whole.rows} >= {"broken", "survived", "skipped"}
    assert all(0 < whole.accuracy(norm) < whole.clean < 1 for norm in ("linf", "l2"))
    expected = ordered(whole.rows)
    for size in (1, 7):
        assert ordered(run(batch_size=size).rows) == expected

    net = digits[0]
    before = net.calls
    run(batch_size=7)
    monkeypatch.setattr(Net, "stop_at", net.calls + (net.calls - before) // 2)
    with pytest.raises(KeyboardInterrupt):
        run(batch_size=7, out=tmp_path / "out")
    assert len({row.id for row in read_rows(tmp_path / "out" / "rows.csv")}) in (7, 14)  # whole batches of four
    monkeypatch.setattr(Net, "stop_at", None)
    again = run(batch_size=5, out=tmp_path / "out")
    assert again.meta["resumed_samples"] in (7, 14)
    assert ordered(again.rows) == expected

    dropping = Attack.run
    monkeypatch.setattr(Attack, "run", lambda *given, **options: dropping(*given, **{**options, "early_drop": False}))
    assert ordered(run(batch_size=64).rows) == expected
