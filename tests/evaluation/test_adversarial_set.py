"""keep="all": the adversarial input of every sample, whatever happens on the way, and the progress shown meanwhile."""

import io

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sg_lightning import RobustnessEvaluation
from sg_lightning.attacks import load_suite
from sg_lightning.domains import Box
from sg_lightning.evaluation import evaluate
from sg_lightning.evaluation.adversarial import AdversarialStore
from sg_lightning.evaluation.progress import TqdmBar
from sg_lightning.threats import L0, Budget, Linf

BUDGETS = {"linf": Budget(eps=("1/32", "1/16", "5/16"), headline="1/16"), "l0": Budget(eps=(1, 2), headline=1)}
THREATS = {"linf": Linf("1/16"), "l0": L0(1)}


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def data(n=30):
    x = torch.rand(n, 1, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        y = network()(x).argmax(1)
    y[::6] = (y[::6] + 1) % 3  # some samples are wrong without an attack
    return x, y


def run(folder, **options):
    options = {
        "suite": "quick",
        "budgets": BUDGETS,
        "check_samples_count": 5,
        "progress": False,
        "batch_size": 8,
        **options,
    }
    return evaluate(network(), data(), out=folder, keep="all", **options)


def same(one, two):
    return all(torch.equal(one[k], two[k]) if torch.is_tensor(one[k]) else one[k] == two[k] for k in one)


def read(folder):
    return {path.stem: torch.load(path) for path in sorted((folder / "adversarial").iterdir())}


@pytest.mark.parametrize("suite", ["quick", "basic"])  # basic: budgets below and above the headline too
def test_every_sample_is_there_and_keeps_what_it_promises(tmp_path, suite):
    result, (x, y), net = run(tmp_path, suite=suite), data(), network()
    assert sorted(path.name for path in (tmp_path / "adversarial").iterdir()) == ["l0.pt", "linf.pt"]
    for norm, found in read(tmp_path).items():
        assert found["eps"] == result.headline(norm)
        assert found["ids"].tolist() == list(range(30))
        assert torch.equal(found["labels"], y)
        assert torch.equal(found["clean_correct"], net(x).argmax(1) == y)
        assert bool(THREATS[norm].contains(found["x_adv"], x).all())
        wrong = net(found["x_adv"]).argmax(1) != y
        assert torch.equal(found["success"], wrong & found["clean_correct"])
        assert torch.equal(~wrong, torch.from_numpy(result.robust(norm)))
        assert torch.equal(found["x_adv"][~found["clean_correct"]], x[~found["clean_correct"]])
        stood = ~wrong
        assert 0 < stood.sum() < 30
        moved = (found["x_adv"] != x).flatten(1).any(1)
        assert bool(moved[stood].all())  # the best that was found, not the clean input


def test_batches_resume_and_processes_do_not_change_it(tmp_path):
    run(tmp_path / "whole")
    wanted = read(tmp_path / "whole")
    run(tmp_path / "ones", batch_size=1)
    assert all(same(wanted[norm], found) for norm, found in read(tmp_path / "ones").items())

    class Unplugged(RuntimeError):
        pass

    kept = AdversarialStore.commit
    for batch in (0, 2):  # killed after its part was written, before its rows were

        def commit(self, ids, batch=batch):
            kept(self, ids)
            if ids[0] == 8 * batch:
                raise Unplugged

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AdversarialStore, "commit", commit)
            with pytest.raises(Unplugged):
                run(tmp_path / "killed")
    run(tmp_path / "killed", batch_size=5)
    assert all(same(wanted[norm], found) for norm, found in read(tmp_path / "killed").items())
    run(tmp_path / "killed")  # once more: everything is done
    assert len(read(tmp_path / "killed")) == 2

    module = Module()
    callback = RobustnessEvaluation("quick", budgets=BUDGETS, check_samples_count=5, out=tmp_path / "two", keep="all")
    pl.Trainer(
        accelerator="cpu", strategy="ddp_fork", devices=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], default_root_dir=tmp_path,
    ).test(module, DataLoader(TensorDataset(*data()), batch_size=4), verbose=False)  # fmt: skip
    for norm, found in read(tmp_path / "two").items():
        assert same({k: wanted[norm][k] for k in ("ids", "labels", "success")}, found | {})
        assert torch.equal(found["x_adv"], wanted[norm]["x_adv"])


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x)

    def test_step(self, batch, batch_idx):
        pass


def test_dicts_of_tensors_are_kept_by_modality(tmp_path):
    suite = load_suite("quick", BUDGETS)
    store = AdversarialStore(tmp_path, suite)
    x = {"image": torch.zeros(3, 2), "sound": torch.zeros(3, 4)}
    store.begin(x)
    moved = {"image": torch.ones(2, 2), "sound": torch.full((2, 4), 2.0)}
    store.hold(
        suite.entries[0].threat, torch.tensor([0, 2]), moved, torch.tensor([True, False]), torch.tensor([True, False])
    )
    store.commit([5, 6, 7])
    (path,) = (tmp_path / "adversarial").iterdir()
    part = torch.load(path)
    assert part["ids"].tolist() == [5, 6, 7]
    assert part["x_adv"]["linf"]["image"].tolist() == [[1, 1], [0, 0], [0, 0]]
    assert part["x_adv"]["linf"]["sound"].sum(1).tolist() == [8, 0, 0]
    assert part["x_adv"]["l0"]["image"].sum() == 0


def test_what_cannot_work_is_said(tmp_path):
    with pytest.raises(ValueError, match="give out="):
        evaluate(network(), data(), "quick", budgets=BUDGETS, keep="all", progress=False)
    with pytest.raises(ValueError, match="give out="):
        RobustnessEvaluation(budgets=BUDGETS, keep="all")
    with pytest.raises(ValueError, match="keep must be 'few' or 'all', got 'none'"):
        RobustnessEvaluation(budgets=BUDGETS, keep="none")
    evaluate(network(), data(), "quick", budgets=BUDGETS, out=tmp_path / "few", progress=False)
    assert not (tmp_path / "few/adversarial").exists()
    with pytest.raises(ValueError, match="keep was None, is 'all'"):
        run(tmp_path / "few", check_samples_count=128)


def test_full_disk_is_said_and_nothing_half_written_stays(tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("unexpected pos 512 vs 448")  # what torch.save makes of ENOSPC

    monkeypatch.setattr(torch, "save", full)
    store = AdversarialStore(tmp_path, load_suite("quick", BUDGETS))
    store.begin(data()[0])
    with pytest.raises(OSError, match=r"cannot write adversarial inputs to .*it goes on from there"):
        store.commit([0])
    assert not list((tmp_path / "adversarial").iterdir())


class Seen:
    """A bar that remembers."""

    def __init__(self):
        self.attacks, self.samples, self.started, self.ended = [], 0.0, [], 0

    def begin(self, name, total, done):
        self.started.append((name, total, done))

    def show(self, attack):
        self.attacks.append(attack)

    def advance(self, samples):
        self.samples += samples

    def end(self):
        self.ended += 1


def test_progress_names_every_attack_and_ends_at_all_samples(monkeypatch):
    bar = Seen()
    monkeypatch.setattr("sg_lightning.callbacks.robustness.bar_beside", lambda trainer: bar)
    callback = RobustnessEvaluation("basic", budgets=BUDGETS, check_samples_count=5, domain=Box())
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[callback]
    )
    trainer.test(Module(), DataLoader(TensorDataset(*data()), batch_size=15), verbose=False)
    assert bar.started == [("attacks (basic)", 30, 0)]
    assert bar.ended == 1
    assert bar.samples == pytest.approx(30, rel=0.02)  # the overwhelming budget of the checks is estimated
    assert {"linf 1/32 fgsm", "linf 5/16 pgd-40x2", "l0 2 random"} <= set(bar.attacks)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "file"])
def test_bar_shows_attack_samples_and_remaining_time(stream):
    bar = TqdmBar(stream)
    bar.begin("attacks (quick)", 20, 5)
    bar.show("linf 2/16 pgd-10")
    # At once where somebody looks, not a line per attack in a log.
    assert ("linf 2/16 pgd-10" in stream.getvalue()) == stream.isatty()
    bar.advance(2.5)
    bar.advance(100)
    bar.end()
    last = stream.getvalue().split("\r")[-1]
    assert "attacks (quick) 100%" in last
    assert "20/20 samples" in last
