"""Adversarial training equals a loop by hand, alone and with the penalty, and leaves the network as it was."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from sg_lightning.attacks import FGSM, PGD, Oracle
from sg_lightning.backbones import ConvNet
from sg_lightning.callbacks import SparseGradient
from sg_lightning.domains import Box
from sg_lightning.modules import AdversarialClassifier, SpikingClassifier
from sg_lightning.modules.adversarial import AdversarialTraining
from sg_lightning.neurons import LIF
from sg_lightning.objectives import sparse_gradient_penalty
from sg_lightning.threats import Linf

EPS, WEIGHT, BATCH, SAMPLES = 0.1, 0.05, 4, 16
FIXED = PGD(Linf(EPS), steps=3, step_size=0.05, random_start=False)
RANDOM = PGD(Linf(EPS), steps=3, step_size=0.05)


def network(kind=ConvNet):
    """A small net that fires in evaluation mode too: its batch-norm statistics are those of the data."""
    torch.manual_seed(7)
    net = kind(4, 1, 4, channels=(6,), hidden=12, time_steps=2, neuron=LIF(0.9, threshold=0.5))
    with torch.no_grad():
        for _ in range(30):
            net(data()[0])
    return net


def data():
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(SAMPLES, 1, 4, 4, generator=generator)
    return x, torch.randint(4, (SAMPLES,), generator=generator)


def loader():
    return DataLoader(TensorDataset(*data()), batch_size=BATCH)


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def trainer(**options):
    defaults = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return pl.Trainer(**{**defaults, **quiet, **options})


def state(net):
    return [v.detach().clone() for v in net.state_dict().values()]


def difference(one, two):
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(one, two, strict=True))


def worst_of(net, x, y):
    """Textbook L-infinity PGD from the clean point; the point of highest loss, misclassified or not."""
    best, best_loss = x.clone(), torch.full((len(x),), -torch.inf)
    adv = x.clone()
    for step in range(4):
        adv = adv.detach().requires_grad_()
        losses = cross_entropy(net(adv), y, reduction="none")
        better = losses > best_loss
        best = torch.where(better.view(-1, 1, 1, 1), adv.detach(), best)
        best_loss = torch.where(better, losses.detach(), best_loss)
        if step < 3:
            (g,) = torch.autograd.grad(losses.sum(), adv)
            adv = (x + (adv + 0.05 * g.sign() - x).clamp(-EPS, EPS)).clamp(0, 1)
    return best.detach()


def by_hand(weight=0.0, accumulate=1):
    net = network()
    optimizer = sgd(net.parameters())
    for step, (x, y) in enumerate(loader()):
        net.eval()
        adv = worst_of(net, x, y)
        net.train()
        watched = adv.clone().requires_grad_()
        logits = net(watched)
        loss = cross_entropy(logits, y)
        if weight:
            loss = loss + weight * sparse_gradient_penalty(net, watched, y, logits=logits)
        (loss / accumulate).backward()
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return state(net)


def fitted(callback=None, attack=FIXED, crafting_mode="eval", **options):
    module = AdversarialClassifier(network(), sgd, attack=attack, crafting_mode=crafting_mode)
    trainer(callbacks=[callback] if callback else None, **options).fit(module, loader())
    return state(module.backbone)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_equals_a_loop_by_hand(accumulate):
    got = fitted(accumulate_grad_batches=accumulate)
    assert difference(got, by_hand(accumulate=accumulate)) < 1e-6
    plain = SpikingClassifier(network(), sgd)
    trainer(accumulate_grad_batches=accumulate).fit(plain, loader())
    assert difference(got, state(plain.backbone)) > 1e-4


@pytest.mark.parametrize("accumulate", [1, 2])
def test_penalty_is_taken_at_the_attacked_inputs(accumulate):
    got = fitted(SparseGradient(WEIGHT), accumulate_grad_batches=accumulate)
    assert difference(got, by_hand(WEIGHT, accumulate)) < 1e-6
    assert difference(got, fitted(accumulate_grad_batches=accumulate)) > 1e-4


class Counting(ConvNet):
    calls = 0

    def logits(self, x):
        self.calls += torch.is_grad_enabled() and self.training
        return super().logits(x)


def test_penalty_shares_the_forward_of_the_attacked_step():
    net = network(Counting)
    net.calls = 0
    module = AdversarialClassifier(net, sgd, attack=FIXED)
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*val_dataloader.*")
        warnings.filterwarnings("ignore", message=".*num_workers.*|.*does not have many workers.*")
        trainer(callbacks=[SparseGradient(WEIGHT)], log_every_n_steps=1).fit(module, loader())
    assert net.calls == 2 * SAMPLES // BATCH


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_crafting_touches_nothing_but_the_input(mode):
    net = network()
    x, y = data()
    cross_entropy(net(x), y).backward()  # gradients half-way through an accumulation
    net.features[1].eval()  # a batch norm that the user has frozen
    gradients = [p.grad.clone() for p in net.parameters()]
    before, flags = state(net), [m.training for m in net.modules()]
    module = AdversarialClassifier(net, sgd, attack=FIXED, crafting_mode=mode)
    adv = module.craft(x, y)
    assert not adv.requires_grad
    assert 0 < (adv - x).abs().max() <= EPS + 1e-6
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), gradients, strict=True))
    assert difference(before, state(net)) == 0.0
    assert [m.training for m in net.modules()] == flags
    assert not x.requires_grad


def test_crafting_mode_decides_the_statistics():
    x, y = data()

    def shifted():  # running statistics far from those of the batch, so that the modes disagree
        net = network()
        net.features[1].running_mean -= 0.3
        return net

    wanted = {}
    for mode in ("eval", "train"):
        net, point = shifted().train(mode == "train"), x.clone().requires_grad_()
        (g,) = torch.autograd.grad(cross_entropy(net(point), y), point)
        wanted[mode] = (x + EPS * g.sign()).clamp(0, 1)
    assert not torch.equal(wanted["eval"], wanted["train"])
    for mode in ("eval", "train"):
        adv = AdversarialClassifier(shifted(), sgd, attack=FGSM(Linf(EPS)), crafting_mode=mode).craft(x, y)
        moved = (adv - x).abs().flatten(1).amax(1) > 0  # where the step lowered the loss the start is kept
        assert moved.sum() > 4
        assert torch.allclose(adv[moved], wanted[mode][moved], atol=1e-6)


def test_random_starts_differ_between_batches_and_follow_the_seed():
    only_start = PGD(Linf(EPS), steps=1, step_size=1e-9)
    x = torch.full((2, 1, 4, 4), 0.5)
    y = torch.tensor([0, 1])
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    with torch.no_grad():  # never broken, so that the start itself is seen
        net[1].weight.zero_()
        net[1].bias.copy_(torch.tensor([0.0, 0, 0, 0]))
    module = AdversarialClassifier(net, sgd, attack=only_start)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append([module.craft(x, y), module.craft(x, y)])
    (a, b), (c, d), (e, _) = draws
    assert torch.equal(a, c)
    assert torch.equal(b, d)
    assert not torch.equal(a, b)
    assert not torch.equal(a, e)


class Saving(pl.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            torch.save(pl_module.craft(*batch), self.folder / f"adv{trainer.global_rank}.pt")

    def on_train_end(self, trainer, pl_module):
        learned = [p.detach() for p in pl_module.parameters()]
        torch.save(learned, self.folder / f"net{trainer.global_rank}.pt")


def test_two_processes(tmp_path):
    class Same(pl.LightningDataModule):
        def train_dataloader(self):
            return loader()

    module = AdversarialClassifier(network(), sgd, attack=RANDOM)
    callbacks = [SparseGradient(WEIGHT), Saving(tmp_path)]
    run = trainer(strategy="ddp_fork", devices=2, callbacks=callbacks, use_distributed_sampler=False)
    run.fit(module, datamodule=Same())
    zero, one = (torch.load(tmp_path / f"net{rank}.pt") for rank in (0, 1))
    assert difference(zero, one) == 0.0
    # The same images on both ranks, other noise.
    assert not torch.equal(torch.load(tmp_path / "adv0.pt"), torch.load(tmp_path / "adv1.pt"))


def test_bf16_trains():
    module = AdversarialClassifier(network(), sgd, attack=RANDOM)
    run = trainer(callbacks=[SparseGradient(WEIGHT)], precision="bf16-mixed")
    run.fit(module, loader())
    assert torch.isfinite(run.callback_metrics["train/loss"])
    assert torch.isfinite(run.callback_metrics["train/sg_penalty"])


def test_evaluation_is_clean():
    module = AdversarialClassifier(network(), sgd, attack=RANDOM)
    plain = SpikingClassifier(network(), sgd)
    assert trainer().test(module, loader(), verbose=False) == trainer().test(plain, loader(), verbose=False)


def test_composes_with_another_mixin():
    class Inverting(SpikingClassifier):
        def loss_inputs(self, x, y):
            return [*super().loss_inputs(x, y), 1 - x]

    class Both(AdversarialTraining, Inverting):
        pass

    x, y = data()
    module = Both(network(), sgd, attack=FIXED)
    clean, inverted = module.loss_inputs(x, y)
    assert torch.equal(clean, module.craft(x, y))
    assert (inverted - (1 - x)).abs().max() <= EPS + 1e-6


def test_oracle_mode_is_checked():
    with pytest.raises(ValueError, match="mode"):
        Oracle(network(), mode="test")


def test_bad_arguments():
    with pytest.raises(TypeError, match="attack must be an Attack"):
        AdversarialClassifier(network(), sgd, attack="pgd")
    with pytest.raises(ValueError, match="crafting_mode must be 'eval' or 'train', got 'off'"):
        AdversarialClassifier(network(), sgd, attack=FIXED, crafting_mode="off")
    with pytest.raises(ValueError, match=r"domain Box \[0, 255\] but the inputs of ConvNet live in Box \[0, 1\]"):
        AdversarialClassifier(network(), sgd, attack=PGD(Linf(8, domain=Box(0, 255)), steps=2))


def test_bad_labels_are_found_before_the_attack():
    x, y = data()
    module = AdversarialClassifier(network(), sgd, attack=FIXED)
    rows = DataLoader(TensorDataset(x, y + 1), batch_size=BATCH)
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.3 for 4 classes"):
        trainer().fit(module, rows)
