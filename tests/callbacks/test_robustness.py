"""RobustnessEvaluation in fit, validate and test, on modules that know nothing of us."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from sg_lightning import RobustnessEvaluation, evaluate
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
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), **{"max_epochs": 3, **options},
    )  # fmt: skip


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
    assert module.training is True or module.training is False


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
