"""Dictionaries of modalities go through the whole evaluation: rows, resume, joint budgets, files, report."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from sg_lightning.attacks import Attack
from sg_lightning.domains import Binary, Box
from sg_lightning.evaluation import RobustnessResult, evaluate
from sg_lightning.evaluation.engine import overwhelming
from sg_lightning.evaluation.rows import read_rows
from sg_lightning.inputs import select
from sg_lightning.neurons import LIF
from sg_lightning.threats import Budget, EventFlips, Joint, JointBudget, Linf, Modality, SpikeRetiming

SUITE = """
attacks:
  - {attack: pgd, steps: 4}
  - {attack: apgd, steps: 5, estimators: [training, hart], only: [linf]}
  - {attack: square, queries: 12, only: [linf]}
  - {attack: greedy, candidates: 8, only: [flips]}
  - {attack: retiming, steps: 4, only: [retime_inf]}
  - {attack: in_turn, rounds: 1, only: [joint]}
"""
DOMAIN = {"image": Box(), "audio": Binary()}
BUDGETS = {
    "image_linf": Budget(eps=(0.01, 0.03), headline=0.03, reason="halves the accuracy"),
    "audio_flips": Budget(eps=("2%", "5%"), headline="5%"),
    "audio_retime_inf": Budget(eps=(1,), headline=1),
    "joint": JointBudget(eps=(0.5, 1), headline=1, of=("image_linf", "audio_flips")),
}


class Net(nn.Module):
    """A spiking network of two modalities in float64, which may die at one of its answers."""

    domain = DOMAIN
    calls, stop_at = 0, None

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.eye, self.ear = nn.Linear(9, 24), nn.Linear(5, 24)
        self.fire, self.last = LIF(beta=0.8), nn.Linear(24, 4)
        self.double()

    def forward(self, x):
        type(self).calls += 1
        if type(self).calls == self.stop_at:
            raise KeyboardInterrupt
        current = 3 * self.eye(x["image"].flatten(1)) + 2 * self.ear(x["audio"].transpose(0, 1))
        logits = self.last(self.fire(current).mean(0))
        return logits + (logits.round(decimals=9) - logits).detach()  # ties do not depend on the batch


def data(n=24):
    generator = torch.Generator().manual_seed(3)
    x = {
        "image": torch.rand(n, 1, 3, 3, generator=generator, dtype=torch.float64),
        "audio": (torch.rand(n, 8, 5, generator=generator) < 0.5).double(),
    }
    with torch.no_grad():
        y = Net()(x).argmax(1)
    y[::6] = (y[::6] + 1) % 4  # wrong to begin with
    return x, y


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "mixed.yaml"
    path.write_text(SUITE)

    def measure(given=None, **options):
        options = {"suite": path, "budgets": BUDGETS, "domain": DOMAIN, "check_samples_count": 4, **options}
        return evaluate(Net(), given or data(), progress=False, **options)

    return measure


def ordered(rows):
    return sorted((replace(row, size=round(row.size, 9)) for row in rows), key=repr)


def test_rows_are_identical(run, tmp_path, monkeypatch):
    whole = run(batch_size=64)
    assert {row.status for row in whole.rows} == {"broken", "survived", "skipped"}
    assert all(0 < whole.accuracy(norm) < whole.clean < 1 for norm in whole.norms), whole.table()
    expected = ordered(whole.rows)
    for size in (1, 7):
        assert ordered(run(batch_size=size).rows) == expected

    before = Net.calls
    run(batch_size=7)
    monkeypatch.setattr(Net, "stop_at", Net.calls + (Net.calls - before) // 2)
    with pytest.raises(KeyboardInterrupt):
        run(batch_size=7, out=tmp_path / "out")
    assert len({row.id for row in read_rows(tmp_path / "out" / "rows.csv")}) in (7, 14)
    monkeypatch.setattr(Net, "stop_at", None)
    again = run(batch_size=5, out=tmp_path / "out")
    assert again.meta["resumed_samples"] in (7, 14)
    assert ordered(again.rows) == expected
    assert RobustnessResult.load(tmp_path / "out").metrics() == whole.metrics()

    dropping = Attack.run
    monkeypatch.setattr(Attack, "run", lambda *given, **options: dropping(*given, **{**options, "early_drop": False}))
    assert ordered(run(batch_size=64).rows) == expected


class Pairs(Dataset):
    domain, budgets = DOMAIN, BUDGETS

    def __len__(self):
        return 24

    def __getitem__(self, index):
        x, y = data()
        return {k: v[index] for k, v in x.items()}, y[index]


def test_loaders_give_the_same_rows(run):
    assert ordered(run(DataLoader(Pairs(), batch_size=5)).rows) == ordered(run().rows)


def test_figures_have_names_by_modality(run):
    result = run()
    assert result.norms == ["image_linf", "audio_flips", "audio_retime_inf", "joint"]
    keys = {"robust/image_linf_0p03/acc", "robust/audio_flips_5pct/acc", "robust/audio_flips_5pct/random_acc",
            "robust/audio_retime_inf_1/acc", "robust/joint_0p5/acc", "robust/joint_1/acc", "robust/union/acc"}  # fmt: skip
    assert keys <= set(result.metrics())
    assert "audio_flips 5%" in result.table()
    assert result.meta["domain"] == "image: Box [0, 1], audio: Binary {0, 1}"
    assert result.meta["headline budgets"] == {"image_linf": "halves the accuracy"}
    masks = {norm: result.robust(norm) for norm in result.norms}
    assert (result.union_robust() == (masks["image_linf"] & masks["audio_retime_inf"] & masks["joint"])).all()


def test_a_joint_attack_breaks_what_one_modality_breaks(run):
    result = run()
    assert not (result.robust("joint") & ~(result.robust("image_linf") & result.robust("audio_flips"))).any()
    # Half of the budgets holds image 0.01, and no share of the audio that was measured: 2 % is below 2.5 %.
    half = result.robust("joint", 0.5)
    assert not (half & ~(result.robust("image_linf", 0.01) & result.robust("audio_flips", "2%"))).any()
    fell_alone = {
        row.id for row in result.rows if row.norm == "audio_flips" and row.eps == "5%" and row.status == "broken"
    }
    told = {row.status for row in result.rows if row.norm == "joint" and row.eps == "1" and row.id in fell_alone
            and row.phase == "main" and row.attack != "random"}  # fmt: skip
    assert fell_alone
    assert told == {"skipped"}
    assert result.accuracy("joint") < min(result.accuracy("image_linf"), result.accuracy("audio_flips"))


def test_adversarial_inputs_are_kept_whole(run, tmp_path):
    result = run(keep="all", out=tmp_path / "all")
    (x, y), net = data(), Net()
    for norm, threat in (
        ("audio_flips", Modality("audio", EventFlips("5%", Binary()))),
        ("audio_retime_inf", Modality("audio", SpikeRetiming(1, Binary()))),
        ("joint", Joint({"image": Linf(0.03, Box()), "audio": EventFlips("5%", Binary())})),
    ):
        kept = torch.load(tmp_path / "all" / "adversarial" / f"{norm}.pt", weights_only=True)
        assert bool(threat.contains(kept["x_adv"], x).all())
        assert torch.equal(net(kept["x_adv"]).argmax(1) == y, ~kept["success"] & kept["clean_correct"])
        assert torch.equal(kept["success"], kept["clean_correct"] & ~torch.from_numpy(result.robust(norm)))
    assert {example["norm"] for example in result.examples} == {"image_linf", "audio_flips", "audio_retime_inf"}
    for example in result.examples:
        assert example["clean"].shape == ((8, 5) if example["norm"].startswith("audio") else (1, 3, 3))
        assert example["predicted"] != example["label"]


def test_no_network_survives_everything_at_once():
    x, _ = data(2)
    whole = Joint({"image": Linf(0.03), "audio": EventFlips(1)})
    huge = overwhelming(whole, x)
    assert huge == Joint({"image": Linf(0.5), "audio": EventFlips(40)})
    assert overwhelming(Joint({"image": Linf(0.03)}), x) is None
    assert overwhelming(Modality("image", Linf(0.03)), x) is None


def test_substitutes_and_checks(run):
    result = run(substitutes={"seed": Net()}, max_samples=8)
    names = {row.attack for row in result.rows if row.norm == "audio_flips"}
    assert any(name.startswith("transfer-seed/") for name in names)
    assert any(check.norm == "joint" for check in result.checks)


def test_a_page_is_written(run, tmp_path):
    pytest.importorskip("matplotlib")
    from sg_lightning.reporting import provenance, write_report

    results = {"fusion": run()}
    assert "audio: flips" in write_report(results, tmp_path / "report").read_text()
    assert provenance.unit(results, "joint") == "share of the budget of every modality"
    assert provenance.unit(results, "audio_retime_inf") == "largest shift of a spike, in steps"


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"domain": Box()}, "the budget 'image_linf' is for the modality 'image', but the inputs are single tensors"),
            ({"domain": {"image": Box()}}, "has the modalities image, audio, but its domain names image"),
            ({"domain": {"image": Binary(), "audio": Binary()}, "budgets": {"audio_flips": BUDGETS["audio_flips"]}},
             "image of the test data has values that are not integers"),
            ({"budgets": {}}, "no budgets"),
        ],
    )  # fmt: skip
    def test_domains_and_budgets(self, run, change, message):
        with pytest.raises(ValueError, match=message):
            run(**change)

    def test_whole_numbers_stay_whole(self):
        pairs = DataLoader(Pairs(), batch_size=5)
        pairs.domain, pairs.budgets = DOMAIN, BUDGETS
        with pytest.raises(ValueError, match="the data live in Binary"):
            evaluate(Net(), pairs, "quick", domain={"image": Box(), "audio": Box()}, progress=False)
        with pytest.raises(ValueError, match="one domain for each modality"):
            evaluate(Net(), pairs, "quick", domain=Box(), progress=False)

    def test_values(self, run):
        x, y = data()
        x["audio"][0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match="audio of the test data holds 1 NaN"):
            run((x, y))
        with pytest.raises(ValueError, match="modalities image, audio, touch, but its domain names image, audio"):
            run(({**data()[0], "touch": torch.zeros(24, 2)}, y))


def test_missing_modalities_cannot_be_attacked(run):
    x, y = data()
    with pytest.raises((ValueError, KeyError)):
        run(({"image": x["image"]}, y))
    assert select(x, torch.tensor([0]))["image"].shape == (1, 1, 3, 3)
