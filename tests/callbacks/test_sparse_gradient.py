"""The callback equals a loop written by hand, on our module and on others', and leaves no trace."""

import gc
import math
import warnings
import weakref

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from sg_lightning.backbones import ConvNet
from sg_lightning.callbacks import SparseGradient
from sg_lightning.domains import Domain
from sg_lightning.modules import SpikingClassifier
from sg_lightning.neurons import LIF
from sg_lightning.objectives import gradient_ratio_penalty, sparse_gradient_penalty
from sg_lightning.objectives.sparse_gradient import FiniteDifference

WEIGHT, RATE, BATCH, SAMPLES = 0.05, 0.1, 4, 16


def network():
    torch.manual_seed(7)
    return ConvNet(4, 1, 4, channels=(6,), hidden=12, time_steps=2, neuron=LIF(0.9))


def data():
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(SAMPLES, 1, 4, 4, generator=generator)
    return x, torch.randint(4, (SAMPLES,), generator=generator)


def loader(batch_size=BATCH):
    return DataLoader(TensorDataset(*data()), batch_size=batch_size)


def sgd(params):
    return torch.optim.SGD(params, lr=RATE, momentum=0.5)


class Foreign(pl.LightningModule):
    """Somebody else's module: knows nothing of us, and keeps its network under another name."""

    def __init__(self, net=None):
        super().__init__()
        self.net = network() if net is None else net

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self(x), y)

    def configure_optimizers(self):
        return sgd(self.parameters())


class Bypassing(Foreign):
    """Does not call its forward in the step."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self.net(x), y)


class ByKeyword(Foreign):
    """Calls forward with its input by name and a second argument that changes the result."""

    def forward(self, images, gain=1.0):
        return gain * self.net(images)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return {"loss": cross_entropy(self(images=x, gain=2.0), y), "note": 1}


def ours():
    return SpikingClassifier(network(), sgd)


def trainer(**options):
    defaults = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return pl.Trainer(**{**defaults, **quiet, **options})


def fitted(module, callback=None, train=None, **options):
    """Fit; return all weights and buffers that are trained, by position."""
    run = trainer(callbacks=[callback] if callback else None, **options)
    run.fit(module, loader() if train is None else train)
    return weights(module)


def weights(module):
    net = module.net if hasattr(module, "net") else module.backbone
    return [v.detach().clone() for k, v in net.state_dict().items() if "num_batches" not in k]


def by_hand(penalty, *, accumulate=1, epochs=2, clip=None, precision=None, gain=1.0):
    """Train as plain torch: loss plus weighted penalty, both branches through one backward."""
    net = network()
    optimizer = sgd(net.parameters())
    x, y = data()
    batches = [slice(i, i + BATCH) for i in range(0, SAMPLES, BATCH)]
    for _ in range(epochs):
        for step, rows in enumerate(batches):
            # As Lightning: no cache of cast weights, which would add the gradients of both branches in bfloat16.
            with torch.autocast("cpu", precision, enabled=precision is not None, cache_enabled=False):
                watched = x[rows].clone().requires_grad_()
                logits = gain * net(watched)
                loss = cross_entropy(logits, y[rows])
                loss = loss + WEIGHT * penalty(lambda v: gain * net(v), watched, y[rows], logits=logits)
            (loss / accumulate).backward()
            if (step + 1) % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return [v.detach().clone() for k, v in net.state_dict().items() if "num_batches" not in k]


def difference(one, two):
    return max((a - b).abs().max().item() for a, b in zip(one, two, strict=True))


def test_the_penalty_matters():
    plain = fitted(Foreign())
    assert difference(plain, by_hand(lambda *a, **k: 0.0)) < 1e-7
    assert difference(plain, by_hand(sparse_gradient_penalty)) > 1e-3


@pytest.mark.parametrize("make", [Foreign, ours])
@pytest.mark.parametrize(
    ("trainer_options", "hand_options"),
    [
        ({}, {}),
        ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
        ({"precision": "bf16-mixed"}, {"precision": torch.bfloat16}),
        ({"gradient_clip_val": 0.1}, {"clip": 0.1}),
    ],
    ids=["plain", "accumulate", "bf16", "clipped"],
)
def test_equals_a_loop_by_hand(make, trainer_options, hand_options):
    got = fitted(make(), SparseGradient(WEIGHT), **trainer_options)
    assert difference(got, by_hand(sparse_gradient_penalty, **hand_options)) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"output": "softmax"},
        {"power": 1},
        {"difference": "central"},
        {"direction": "l2", "step_size": 0.1},
        {"direction": "l0", "coordinates": 3},
        {"step_size": 0.4, "clamp": True},
    ],
)
def test_options_reach_the_penalty(options):
    got = fitted(Foreign(), SparseGradient(WEIGHT, **options), max_epochs=1)
    wanted = by_hand(lambda f, x, y, logits: sparse_gradient_penalty(f, x, y, logits=logits, **options), epochs=1)
    assert difference(got, wanted) < 1e-6
    assert difference(got, by_hand(sparse_gradient_penalty, epochs=1)) > 1e-6


def test_ratio_penalty():
    def smooth():
        torch.manual_seed(7)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))

    got = fitted(Foreign(smooth()), SparseGradient(WEIGHT, penalty="ratio"), max_epochs=1)
    net = smooth()
    optimizer = sgd(net.parameters())
    for x, y in loader():
        optimizer.zero_grad()
        (cross_entropy(net(x), y) + WEIGHT * gradient_ratio_penalty(net, x, y)).backward()
        optimizer.step()
    assert difference(got, [p.detach() for p in net.parameters()]) < 1e-6


def test_forward_with_keywords_and_more_arguments():
    got = fitted(ByKeyword(), SparseGradient(WEIGHT))
    assert difference(got, by_hand(sparse_gradient_penalty, gain=2.0)) < 1e-6


class Counting(ConvNet):
    def __init__(self):
        torch.manual_seed(7)
        super().__init__(4, 1, 4, channels=(6,), hidden=12, time_steps=2, neuron=LIF(0.9))
        self.calls, self.watched = 0, []

    def logits(self, x):
        self.calls += 1
        self.watched.append(x.requires_grad)
        return super().logits(x)


def test_forward_is_shared():
    for make, per_step in ((Foreign, 2), (SpikingClassifier, 2), (Bypassing, 3)):
        net = Counting()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitted(make(net), SparseGradient(WEIGHT))
        assert net.calls == per_step * 2 * SAMPLES // BATCH
        # Only the point where the gradient is read requires one; elsewhere it would be computed for nobody.
        assert net.watched[-2:] == [True, False]
        told = [w for w in caught if "found no call self(x)" in str(w.message)]
        assert len(told) == (1 if make is Bypassing else 0)


def test_module_that_bypasses_its_forward_gets_the_same_penalty():
    # Batch norm would see one more pass; without it the results are equal.
    def plain():
        torch.manual_seed(7)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))

    with pytest.warns(UserWarning, match=r"Call self\(x\) in training_step"):
        got = fitted(Bypassing(plain()), SparseGradient(WEIGHT))
    assert difference(got, fitted(Foreign(plain()), SparseGradient(WEIGHT))) < 1e-7


class AttackInStep(Foreign):
    """Adversarial training by hand: passes for the attack, then the loss at the attacked point."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        self(x)  # a pass that the loss does not depend on
        adv = x
        for _ in range(3):
            adv = adv.detach().requires_grad_()
            (g,) = torch.autograd.grad(cross_entropy(self(adv), y), adv)
            adv = (adv + 0.05 * g.sign()).clamp(0, 1)
        return cross_entropy(self(adv.detach()), y)


class TwoPoints(Foreign):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return (cross_entropy(self(x), y) + cross_entropy(self(1 - x), y)) / 2


def stateless():
    torch.manual_seed(7)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))


def test_penalty_is_taken_where_the_loss_is():
    def attacked(net, x, y):
        adv = x
        for _ in range(3):
            adv = adv.detach().requires_grad_()
            (g,) = torch.autograd.grad(cross_entropy(net(adv), y), adv)
            adv = (adv + 0.05 * g.sign()).clamp(0, 1)
        return [adv.detach()]

    for make, points in ((AttackInStep, attacked), (TwoPoints, lambda net, x, y: [x, 1 - x])):
        got = fitted(make(stateless()), SparseGradient(WEIGHT), max_epochs=1)
        net = stateless()
        optimizer = sgd(net.parameters())
        for x, y in loader():
            where = points(net, x, y)
            optimizer.zero_grad()
            terms = [cross_entropy(net(p), y) + WEIGHT * sparse_gradient_penalty(net, p, y) for p in where]
            (sum(terms) / len(terms)).backward()
            optimizer.step()
        assert difference(got, [p.detach() for p in net.parameters()]) < 1e-6


def test_inputs_replaced_by_another_callback_are_followed():
    class Shift(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batch[0] = 1 - batch[0]

    flipped = DataLoader(TensorDataset(1 - data()[0], data()[1]), batch_size=BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = trainer(callbacks=[SparseGradient(WEIGHT), Shift()])
        module = Bypassing(stateless())
        run.fit(module, loader())
        assert difference(weights(module), fitted(Bypassing(stateless()), SparseGradient(WEIGHT), flipped)) < 1e-7


def test_dropout_sees_the_same_masks_at_both_points():
    def noisy():
        torch.manual_seed(7)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 64), nn.Dropout(0.5), nn.Linear(64, 4))

    logged = {}
    for make in (Foreign, Bypassing):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = trainer(callbacks=[SparseGradient(WEIGHT)], max_epochs=1)
            run.fit(make(noisy()), loader())
        logged[make] = run.callback_metrics["train/sg_penalty"].item()
    # Different masks differ in probability by .1 or so: over a step of .01 and squared, by 100.
    assert 0 < logged[Foreign] < 2
    assert 0 < logged[Bypassing] < 2


# -- float16 ------------------------------------------------------------------------------------------------------------


class Scaling(pl.LightningModule):
    """Records the gradients that arrive at the optimiser."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.seen = []

    forward = Foreign.forward
    training_step = Foreign.training_step

    def on_before_optimizer_step(self, optimizer):
        self.seen.append([p.grad.detach().clone() for p in self.parameters()])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Float32WithScaler(MixedPrecision):
    """The loss scaling of 16-mixed around float32 arithmetic, so that only the scaling is tested."""

    def autocast_context_manager(self):
        return torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_scaling_cancels(accumulate):
    gradients = {}
    for plugin in (None, Float32WithScaler("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))):
        module = Scaling(network())
        options = {} if plugin is None else {"plugins": [plugin]}
        fitted(module, SparseGradient(WEIGHT), max_epochs=1, accumulate_grad_batches=accumulate, **options)
        gradients[plugin] = module.seen
    one, two = gradients.values()
    assert len(one) == len(two) == SAMPLES // BATCH // accumulate
    for a, b in zip(one, two, strict=True):
        assert max(g.abs().max() for g in a) > 1e-3
        assert all(torch.allclose(g, h, rtol=1e-5, atol=1e-7) for g, h in zip(a, b, strict=True))


def test_float16_with_a_scaler_is_near_float32():
    gradients = []
    for plugin in (None, MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))):
        module = Scaling(stateless())
        fitted(module, SparseGradient(WEIGHT), max_epochs=1, **({} if plugin is None else {"plugins": [plugin]}))
        gradients.append(torch.cat([g.flatten() for step in module.seen for g in step]))
    assert torch.isfinite(gradients[1]).all()
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[0].norm()


def test_input_gradient_survives_float16():
    # Logits that move by 1e-7 per unit of input: below the smallest float16, 6e-8, unless the gradient is scaled.
    class Faint(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 8, bias=False), nn.Linear(8, 4, bias=False)
            nn.init.constant_(self.first.weight, 1e-5)
            self.second.weight.data = torch.linspace(1, 2, 32).view(4, 8) * 1e-3

        def forward(self, x):
            return self.second(self.first(x.flatten(1)))

    grads = {}
    for scale in (1.0, 2.0**16):
        seen = []

        class Watching(SparseGradient):
            def _measure(self, trainer, pl_module, loss):
                found = super()._measure(trainer, pl_module, loss)
                seen.extend(m.slope for m in found)  # noqa: B023
                return found

        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
        fitted(Foreign(Faint()), Watching(WEIGHT), max_epochs=1, plugins=[plugin], limit_train_batches=1)
        grads[scale] = seen[0]
    assert (grads[1.0] == 0).all()
    assert (grads[2.0**16] > 0).all()


# -- several processes --------------------------------------------------------------------------------------------------


class Halves(torch.utils.data.Sampler):
    """Give each process the samples that one process would have in the matching half of a batch."""

    def __init__(self, rank):
        self.rank = rank

    def __iter__(self):
        for start in range(0, SAMPLES, BATCH):
            yield from range(start + self.rank * BATCH // 2, start + (self.rank + 1) * BATCH // 2)

    def __len__(self):
        return SAMPLES // 2


class Sharded(pl.LightningDataModule):
    def train_dataloader(self):
        sampler = Halves(self.trainer.global_rank)
        return DataLoader(TensorDataset(*data()), batch_size=BATCH // 2, sampler=sampler)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_equal_one(accumulate, tmp_path):
    # Our own modules: tests/modules/test_two_processes.py.
    # No batch norm: its statistics are per process, and the mean over ranks of a batch mean is then the batch mean.
    module = Foreign(stateless())
    run = trainer(
        strategy="ddp_fork", devices=2, callbacks=[SparseGradient(WEIGHT), Saving(tmp_path)], use_distributed_sampler=False,
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    run.fit(module, datamodule=Sharded())
    one = fitted(Foreign(stateless()), SparseGradient(WEIGHT), accumulate_grad_batches=accumulate)
    for rank in (0, 1):
        assert difference(torch.load(tmp_path / f"{rank}.pt"), one) < 1e-6


class Saving(pl.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        torch.save(weights(pl_module), self.folder / f"{trainer.global_rank}.pt")


def test_two_processes_with_batch_norm_train_and_agree(tmp_path):
    run = trainer(
        strategy="ddp_fork", devices=2, callbacks=[SparseGradient(WEIGHT), Saving(tmp_path)], use_distributed_sampler=False
    )  # fmt: skip
    run.fit(ours(), datamodule=Sharded())
    zero, one = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    names = [k for k in network().state_dict() if "num_batches" not in k]
    learned = [i for i, k in enumerate(names) if k.endswith(("weight", "bias"))]
    assert difference([zero[i] for i in learned], [one[i] for i in learned]) == 0.0


# -- traces -------------------------------------------------------------------------------------------------------------


def hook_count(module):
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def test_hooks_and_tensors_are_gone_after_fit():
    module, callback = ours(), SparseGradient(WEIGHT)
    held = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            gc.collect()
            assert all(ref() is None for ref in held)  # nothing of the step before

        def on_before_backward(self, trainer, pl_module, loss):
            held.append(weakref.ref(callback._batch[0]))

    class Peek(SparseGradient):
        def _measure(self, trainer, pl_module, loss):
            held.extend(weakref.ref(t) for call in self._calls for t in (call.x, call.logits))
            return super()._measure(trainer, pl_module, loss)

    callback = Peek(WEIGHT)
    trainer(callbacks=[Watch(), callback]).fit(module, loader())
    assert len(held) == 3 * 2 * SAMPLES // BATCH
    gc.collect()
    assert all(ref() is None for ref in held)
    assert hook_count(module) == 0
    assert callback._batch is None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_are_gone_after_an_exception(error):
    class Failing(Foreign):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 1:
                raise error("stop")
            return loss

    module, callback = Failing(), SparseGradient(WEIGHT)
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        fitted(module, callback)
    assert hook_count(module) == 0
    assert not callback._calls
    assert callback._batch is None
    # and the same callback serves another run
    got = fitted(Foreign(), callback)
    assert difference(got, by_hand(sparse_gradient_penalty)) < 1e-6


def test_batches_of_the_user_stay_as_they_are():
    x, y = data()
    x.requires_grad_(False)
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]

    class Looking(Foreign):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            assert not batch[0].requires_grad
            assert batch[0].grad is None
            return loss

    before = x.clone()
    fitted(Looking(), SparseGradient(WEIGHT), DataLoader(batches, batch_size=None))
    assert torch.equal(x, before)
    assert all(not b[0].requires_grad and b[0].grad is None for b in batches)


def test_weight_zero_is_off():
    module, callback = Foreign(Counting()), SparseGradient(0.0)
    got = fitted(module, callback)
    assert difference(got, fitted(Foreign())) == 0.0
    assert module.net.calls == 2 * SAMPLES // BATCH


def test_validation_in_between_is_left_alone():
    class Validated(Foreign):
        def validation_step(self, batch, batch_idx):
            assert not self(batch[0]).requires_grad

    module = Validated(Counting())
    run = trainer(callbacks=[SparseGradient(WEIGHT)], num_sanity_val_steps=2)
    run.fit(module, loader(), loader())
    steps = 2 * SAMPLES // BATCH
    assert module.net.calls == 2 * steps + steps + 2


def test_an_optimiser_that_repeats_the_step():
    class Repeating(Foreign):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    got = fitted(Repeating(stateless()), SparseGradient(WEIGHT), max_epochs=1)
    net = stateless()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)
    for x, y in loader():

        def closure():
            optimizer.zero_grad()
            loss = cross_entropy(net(x), y) + WEIGHT * sparse_gradient_penalty(net, x, y)  # noqa: B023
            loss.backward()
            return loss

        optimizer.step(closure)
    assert difference(got, [p.detach() for p in net.parameters()]) < 1e-4  # curvature estimates amplify rounding
    assert difference(got, fitted(Repeating(stateless()), max_epochs=1)) > 1e-2


def test_logged_values():
    net = network()
    run = trainer(callbacks=[SparseGradient(WEIGHT)], max_epochs=1, limit_train_batches=1)
    module = SpikingClassifier(net, lambda params: torch.optim.SGD(params, lr=0.0))
    run.fit(module, loader())
    reference = network()
    x, y = (t[:BATCH] for t in data())
    penalty = sparse_gradient_penalty(reference, x, y).item()
    assert run.callback_metrics["train/sg_penalty"].item() == pytest.approx(penalty, rel=1e-5)
    assert -1 <= run.callback_metrics["train/sg_fidelity"].item() <= 1
    assert run.callback_metrics["train/loss"].item() == pytest.approx(cross_entropy(reference(x), y).item(), rel=1e-5)


def test_compiled_module():
    module = Foreign(stateless())
    compiled = torch.compile(module, backend="eager")
    run = trainer(callbacks=[SparseGradient(WEIGHT)], max_epochs=1)
    run.fit(compiled, loader())
    assert difference(weights(module), fitted(Foreign(stateless()), SparseGradient(WEIGHT), max_epochs=1)) < 1e-6


def test_compiled_network_whose_backward_may_overwrite_its_graph():
    # Whether the first activations may be overwritten is decided while compiling: 2 * z leaves some of that kind.
    class Doubling(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(7)
            self.first, self.last = nn.Linear(16, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.last(torch.tanh(2 * self.first(x.flatten(1))))

    wanted = [fitted(Foreign(Doubling()), callback, max_epochs=1) for callback in (None, SparseGradient(WEIGHT))]
    compiled = [torch.compile(Doubling(), backend="aot_eager") for _ in range(2)]
    assert difference(fitted(Foreign(compiled[0]), max_epochs=1), wanted[0]) < 1e-6
    assert difference(fitted(Foreign(compiled[1]), SparseGradient(WEIGHT), max_epochs=1), wanted[1]) < 1e-6


def test_graphs_compiled_before_are_not_reused():
    made = []

    def backend(graph, inputs):
        made.append(torch._functorch.config.donated_buffer)
        return graph.forward

    net = torch.compile(stateless(), backend=backend)
    fitted(Foreign(net), max_epochs=1)
    before = len(made)
    fitted(Foreign(net), SparseGradient(WEIGHT), max_epochs=1)
    assert all(made[:before])
    assert made[before:]
    assert not any(made[before:])
    assert torch._functorch.config.donated_buffer


# -- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -0.1}, r"weight must be finite and >= 0 .* got -0\.1"),
        ({"weight": math.nan}, "weight must be finite"),
        ({"weight": 1, "direction": "linfty"}, "unknown direction"),
        ({"weight": 1, "penalty": "l0"}, "unknown penalty 'l0'; choose one of difference, ratio"),
        ({"weight": 1, "penalty": "ratio", "step_size": 0.1}, "only output= applies"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SparseGradient(**options)


class Manual(Foreign):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Features(Foreign):
    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def forward(self, x):
        return {"logits": self.net(x)}


class Normalising(Foreign):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self((x - 0.5) / 0.25), y)


class FirstOfBatch(Foreign):
    def training_step(self, batch, batch_idx):
        return self(batch[0]).mean()


def test_modules_that_do_not_fit():
    callback = SparseGradient(WEIGHT)
    with pytest.raises(ValueError, match="Manual uses manual optimisation"):
        fitted(Manual(), callback)
    told = r"found no call self\(x\)"
    with (
        pytest.warns(UserWarning, match=told),
        pytest.raises(TypeError, match=r"Features.forward\(x\) must return logits"),
    ):
        fitted(Features(), callback)
    with pytest.warns(UserWarning, match=r"forward\(\) sees inputs spread 4 times as wide"):
        fitted(Normalising(), callback, max_epochs=1)


def test_batches_that_do_not_fit():
    x, y = data()

    def run(*columns, module=FirstOfBatch):
        return fitted(module(), SparseGradient(WEIGHT), DataLoader(TensorDataset(*columns), batch_size=BATCH))

    with pytest.raises(ValueError, match=r"needs batches \(x, y\), got a list of 3; subclass it and override unpack"):
        run(x, y, y)
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.3 for 4 classes, got 2\.\.5"):
        run(x, torch.arange(SAMPLES) + 2)
    with pytest.raises(ValueError, match="labels must be class indices, int64"):
        run(x, y.float())
    with pytest.raises(ValueError, match="labels must be class indices, int64"):
        run(x, torch.eye(4)[y])

    class Bytes(FirstOfBatch):
        def training_step(self, batch, batch_idx):
            return self.net(batch[0].float()).mean()

    told = r"found no call self\(x\)"
    with pytest.warns(UserWarning, match=told), pytest.raises(ValueError, match=r"floating-point .* got torch\.uint8"):
        run((x * 255).byte(), y, module=Bytes)


def test_bytes_converted_in_the_step_are_fine():
    class Converting(Foreign):
        def training_step(self, batch, batch_idx):
            return cross_entropy(self(batch[0].float() / 255), batch[1])

    x, y = data()
    rows = DataLoader(TensorDataset((x * 255).byte(), y), batch_size=BATCH)
    floats = DataLoader(TensorDataset((x * 255).byte().float() / 255, y), batch_size=BATCH)
    got = fitted(Converting(), SparseGradient(WEIGHT), rows)
    assert difference(got, fitted(Foreign(), SparseGradient(WEIGHT), floats)) < 1e-6


def test_from_a_config(tmp_path):
    text = f"""
model: {{class_path: Foreign}}
trainer:
  accelerator: cpu
  logger: false
  callbacks:
    - class_path: sg_lightning.callbacks.SparseGradient
      init_args:
        weight: 1
        direction: l0
        coordinates: 2
        domain: {{low: 0, high: 3, lattice: count}}
  default_root_dir: {tmp_path}
"""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    cli = LightningCLI(Foreign, args=["--config", str(path)], subclass_mode_model=True, run=False)
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, SparseGradient)]
    assert callback.weight == 1
    assert callback.penalty == FiniteDifference("l0", coordinates=2, domain=Domain(0.0, 3.0, "count"))


def test_unpack_can_be_overridden():
    class Named(SparseGradient):
        def unpack(self, batch):
            return batch["image"], batch["label"]

    class NamedModule(Foreign):
        def training_step(self, batch, batch_idx):
            return cross_entropy(self(batch["image"]), batch["label"])

    x, y = data()
    rows = DataLoader([{"image": a, "label": b} for a, b in zip(x, y, strict=True)], batch_size=BATCH)
    assert difference(fitted(NamedModule(), Named(WEIGHT), rows), by_hand(sparse_gradient_penalty)) < 1e-6
