"""RobustnessEvaluation in fit, validate and test, on modules that know nothing of us."""

import csv
import warnings
from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from sg_lightning import RobustnessEvaluation, SparseGradient, evaluate
from sg_lightning.callbacks.loggers import log_result, log_table
from sg_lightning.evaluation import RobustnessResult
from sg_lightning.neurons import LIF
from sg_lightning.threats import Budget

BUDGETS = {"linf": Budget(eps=("1/16", "2/16"), headline="2/16"), "l2": Budget(eps=(0.5,), headline=0.5)}


class Foreign(pl.LightningModule):
    """A spiking network with batch norm, dropout and a learnable decay, by somebody else."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(16, 24), nn.BatchNorm1d(24)
        self.drop, self.last = nn.Dropout(0.2), nn.Linear(24, 3)
        self.fire = LIF(beta=0.9, learn_beta=True)
        self.losses = []

    def forward(self, x):
        current = self.norm(self.first(x.flatten(1))).expand(4, -1, -1)
        return self.last(self.drop(self.fire(current).mean(0)))

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test/loss", cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(n=30, shuffle=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = (torch.rand(n, 1, 4, 4, generator=generator) * 0.5 + 0.25 * y.view(-1, 1, 1, 1)).clamp(0, 1)
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=shuffle, generator=torch.Generator().manual_seed(1))


def trainer(*callbacks, **options):
    defaults = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 3}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **quiet, **options})


def fitted(*callbacks, **options):
    pl.seed_everything(0, verbose=False)
    module = Foreign()
    run = trainer(*callbacks, **options)
    run.fit(module, loader(shuffle=True), loader(20, seed=1))
    return module, run


def test_training_is_bit_identical_with_and_without_it():
    plain, _ = fitted()
    callback = RobustnessEvaluation(budgets=BUDGETS)
    watched, run = fitted(callback)
    assert plain.losses == watched.losses
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True)
    )
    assert all(
        p.grad is None or torch.equal(p.grad, q.grad)
        for p, q in zip(watched.parameters(), plain.parameters(), strict=True)
    )
    assert 0 <= run.callback_metrics["robust/union/acc"] <= run.callback_metrics["robust/clean/acc"]
    assert "robust/linf_2_16/acc" in run.callback_metrics
    assert callback.result.meta["epoch"] == 2


@pytest.mark.parametrize("entry", ["validate", "test"])
def test_validate_and_test_in_inference_mode_equal_evaluate(entry):
    module, _ = fitted(max_epochs=5)
    callback = RobustnessEvaluation("basic", budgets=BUDGETS, check_samples_count=10)
    getattr(trainer(callback), entry)(module, loader(20, seed=1), verbose=False)
    alone = evaluate(module, loader(20, seed=1), "basic", budgets=BUDGETS, check_samples_count=10, progress=False)
    assert sorted(callback.result.rows, key=repr) == sorted(alone.rows, key=repr)
    assert callback.result.metrics() == alone.metrics()
    assert any(row.status == "broken" for row in alone.rows)  # or the test would compare nothing


def test_every_n_epochs_and_sanity_check_and_limits():
    seen = []

    class Spy(RobustnessEvaluation):
        def _finish(self, trainer, pl_module):
            active = self._session is not None
            super()._finish(trainer, pl_module)
            if active:
                seen.append((trainer.current_epoch, len(self.result.ids)))

    fitted(Spy(budgets=BUDGETS, every_n_epochs=2, max_samples=5), max_epochs=4, num_sanity_val_steps=2)
    assert seen == [(1, 5), (3, 5)]
    seen.clear()
    fitted(Spy(budgets=BUDGETS), fast_dev_run=True)
    assert seen == [(0, 8)]
    seen.clear()
    fitted(Spy(budgets=BUDGETS), max_epochs=1, limit_val_batches=2)
    assert seen == [(0, 16)]


def test_early_stopping_and_saved_results(tmp_path):
    stop = pl.callbacks.EarlyStopping("robust/union/acc", mode="max", patience=10)
    fitted(RobustnessEvaluation(budgets=BUDGETS, out=tmp_path), stop, max_epochs=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fit-epoch-0", "fit-epoch-1"]


def test_bfloat16_precision_context():
    callback = RobustnessEvaluation(budgets=BUDGETS)
    _, run = fitted(callback, precision="bf16-mixed", max_epochs=1)
    assert callback.result is not None
    assert 0 <= run.callback_metrics["robust/min/acc"] <= 1


def test_bad_input_is_said_before_training():
    with pytest.raises(ValueError, match="no budgets: pass budgets="):
        fitted(RobustnessEvaluation())
    with pytest.raises(ValueError, match="unknown suite 'quik'"):
        fitted(RobustnessEvaluation("quik", budgets=BUDGETS))
    with pytest.raises(ValueError, match="every_n_epochs must be >= 1"):
        RobustnessEvaluation(every_n_epochs=0)
    with pytest.raises(ValueError, match="shuffle=False"):
        trainer(RobustnessEvaluation(budgets=BUDGETS)).test(Foreign(), loader(shuffle=True), verbose=False)


def decisions(rows):
    return {(row.id, row.norm, row.eps, row.attack): (row.clean, row.status) for row in rows}


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_33_samples_on_two_processes_count_33(tmp_path, stage):
    # float64: decisions must be identical whatever the batch shapes.
    data = loader(33)
    data = DataLoader(TensorDataset(data.dataset.tensors[0].double(), data.dataset.tensors[1]), batch_size=8)
    pl.seed_everything(0, verbose=False)
    module = Foreign().double()
    found = {}
    for name, options in (("one", {}), ("two", {"strategy": "ddp_fork", "devices": 2})):
        callback = RobustnessEvaluation("quick", budgets=BUDGETS, check_samples_count=5, out=tmp_path / name)
        getattr(trainer(callback, **options), stage)(module, data, verbose=False)
        found[name] = RobustnessResult.load(tmp_path / name)
        assert not list((tmp_path / name).glob("rows.*.csv"))
    one, two = found["one"], found["two"]
    assert two.ids.tolist() == list(range(33))  # Lightning's sampler pads to 34
    assert decisions(one.rows) == decisions(two.rows)
    assert one.metrics() == two.metrics()
    assert one.checks == two.checks


def test_interrupted_test_goes_on_and_other_weights_are_refused(tmp_path):
    class Stops(RobustnessEvaluation):
        def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 2:
                raise RuntimeError("pulled the plug")
            super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    pl.seed_everything(0, verbose=False)
    module, data = Foreign(), loader(33)
    whole = RobustnessEvaluation(budgets=BUDGETS)
    trainer(whole).test(module, data, verbose=False)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        trainer(Stops(budgets=BUDGETS, out=tmp_path)).test(module, data, verbose=False)
    again = RobustnessEvaluation(budgets=BUDGETS, out=tmp_path)
    trainer(again).test(module, data, verbose=False)
    assert again.result.meta["resumed_samples"] == 16
    assert decisions(again.result.rows) == decisions(whole.result.rows)
    with pytest.raises(ValueError, match="weights was"):
        trainer(RobustnessEvaluation(budgets=BUDGETS, out=tmp_path)).test(Foreign(), data, verbose=False)


def test_loggers_without_pictures_get_files_and_two_runs_their_own(tmp_path):
    for version in range(2):
        logger = CSVLogger(tmp_path, name="runs")
        callback = RobustnessEvaluation(budgets=BUDGETS)
        pl.Trainer(
            accelerator="cpu", logger=logger, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[callback], max_epochs=1,
        ).fit(Foreign(), loader(shuffle=True), loader(20, seed=1))  # fmt: skip
        folder = tmp_path / "runs" / f"version_{version}"
        assert sorted(p.name for p in (folder / "figures").iterdir()) == [
            "robust_curves_4.png",
            "robust_examples_4.png",
        ]
        (table,) = (folder / "tables").iterdir()
        lines = list(csv.reader(table.open()))
        assert lines[0] == ["norm", "eps", "attack", "steps", "restarts", "n", "seed", "accuracy", "low", "high"]
        assert lines[1][2] == "clean"
        assert float(lines[2][7]) == callback.result.accuracy("linf")
        assert {line[0] for line in lines[2:]} == {"linf", "l2"}
        metrics = (folder / "metrics.csv").read_text().splitlines()[0]
        assert "robust/linf_2_16/acc" in metrics
        assert "robust/union/acc" in metrics


def test_other_loggers_are_taught_by_registering():
    class Mine(DummyLogger):
        seen: ClassVar[list] = []

    @log_table.register(Mine)
    def _(logger, name, columns, rows, step):
        logger.seen.append((name, len(rows)))

    module = Foreign()
    callback = RobustnessEvaluation(budgets=BUDGETS)
    trainer(callback).test(module, loader(9), verbose=False)
    log_result(Mine(), callback.result, 0)
    assert Mine.seen == [("robust/table", 3)]


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"overfit_batches": 2}, {"limit_val_batches": 1}])
def test_trainer_shortcuts(options):
    callback = RobustnessEvaluation(budgets=BUDGETS)
    fitted(callback, **options)
    seen = len(callback.result.ids)
    assert seen == {"fast_dev_run": 8, "overfit_batches": 16, "limit_val_batches": 8}[next(iter(options))]


class Recorder(RobustnessEvaluation):
    """Keeps every union accuracy by epoch."""

    def __init__(self, **options):
        super().__init__(budgets=BUDGETS, **options)
        self.unions = {}

    def _finish(self, trainer, pl_module):
        attacked = self._session is not None
        super()._finish(trainer, pl_module)
        if attacked:
            self.unions[trainer.current_epoch] = self.result.union()


@pytest.mark.parametrize("every", [1, 2])
def test_checkpoint_and_early_stopping_on_the_union(tmp_path, every):
    # Until the first measurement there is nothing to watch: the same rhythm, and strict=False.
    keep = pl.callbacks.ModelCheckpoint(
        tmp_path, monitor="robust/union/acc", mode="max", filename="{epoch}", every_n_epochs=every
    )
    stop = pl.callbacks.EarlyStopping("robust/union/acc", mode="max", patience=2 * every, strict=False)
    callback = Recorder(every_n_epochs=every)
    _, run = fitted(callback, keep, stop, enable_checkpointing=True, max_epochs=12)
    best = max(callback.unions, key=callback.unions.get)  # the first of equals
    assert len(set(callback.unions.values())) > 1
    assert list(callback.unions) == list(range(every - 1, run.current_epoch, every))
    assert keep.best_model_score == pytest.approx(callback.unions[best])
    assert [path.name for path in tmp_path.iterdir()] == [f"epoch={best}.ckpt"]
    assert run.current_epoch < 12 or list(callback.unions)[-1] - best < 2 * every


class CountingForeign(Foreign):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_off_they_cost_not_one_forward_pass_and_no_hook():
    seen = {}

    class Hooks(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            parts = list(pl_module.modules())
            seen["hooks"] = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in parts)

    def calls(*callbacks):
        pl.seed_everything(0, verbose=False)
        module = CountingForeign()
        trainer(Hooks(), *callbacks, num_sanity_val_steps=1).fit(module, loader(), loader(20, seed=1))
        return module.calls, seen["hooks"]

    plain = calls()
    assert plain == (3 * (4 + 3) + 1, 0)
    off = [SparseGradient(0.0), RobustnessEvaluation(budgets=BUDGETS, every_n_epochs=4)]
    assert calls(*off) == plain
    assert calls(RobustnessEvaluation(budgets=BUDGETS, every_n_epochs=3))[0] > plain[0]
    assert calls(SparseGradient(0.1)) == (plain[0] + 3 * 4, 2)


def test_they_print_nothing_of_their_own(capfd):
    def said(*callbacks):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):  # the same callbacks in two runs
                fitted(*callbacks, max_epochs=2)
        shown = capfd.readouterr()
        return sorted({str(w.message) for w in caught}), shown.out, shown.err

    assert said(SparseGradient(0.1), RobustnessEvaluation(budgets=BUDGETS)) == said()


def test_its_bar_stands_below_those_of_lightning(capfd):
    fitted(
        RobustnessEvaluation(budgets=BUDGETS), pl.callbacks.TQDMProgressBar(), enable_progress_bar=True, max_epochs=1
    )
    shown = capfd.readouterr().out
    assert "attacks (quick)" in shown
    assert "/20 samples [" in shown
    fitted(RobustnessEvaluation(budgets=BUDGETS), max_epochs=1)  # no bar wanted, none shown
    assert "attacks" not in "".join(capfd.readouterr())


def test_its_line_in_the_rich_display_is_full_and_then_hidden():
    pytest.importorskip("rich")
    own = pl.callbacks.RichProgressBar()
    fitted(RobustnessEvaluation(budgets=BUDGETS), own, enable_progress_bar=True, max_epochs=2)
    lines = [task for task in own.progress.tasks if "attacks (quick)" in task.description]
    assert len(lines) == 2  # one per epoch
    for line in lines:
        assert "l2 0.5 random" in line.description  # the last
        assert line.total == 20
        assert line.completed == pytest.approx(20)
        assert not line.visible
    assert [task.id for task in own.progress.tasks] == list(range(len(own.progress.tasks)))
