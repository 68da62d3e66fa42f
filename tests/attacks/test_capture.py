"""Captured iterations find what the iterations as they are find.

A CUDA graph runs the kernels of one iteration again, on the same memory, without Python. On a machine without GPU a graph of
torch operations stands for it, traced without values: it too runs no Python again, reads and writes the same tensors, and
refuses whatever asks for a value.
"""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from sg_lightning.attacks import (
    APGD,
    ASSG,
    BPTT,
    HART,
    PGD,
    PGD0,
    SAPGD,
    SPGD,
    Mix,
    MultiTargeted,
    Oracle,
    capture,
)
from sg_lightning.backbones import ConvNet
from sg_lightning.evaluation import evaluate, measure
from sg_lightning.neurons import LIF, use_path
from sg_lightning.neurons.surrogates import Atan
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import L0, L1, L2, Budget, EventFlips, Linf

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Recorder:
    """Captures into a graph of torch operations."""

    def __init__(self):
        self.captured = 0
        self.replayed = 0

    def __call__(self, function, places):
        graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*places)
        self.captured += 1

        def replay():
            self.replayed += 1
            with torch.no_grad():
                results = graph(*places)
            for place, found in zip(places, results, strict=True):
                if found is not place:
                    place.copy_(found)

        return replay


@pytest.fixture
def case():
    torch.manual_seed(2)
    net = ConvNet(num_classes=4, input_size=8, channels=(8,), hidden=24, time_steps=3, neuron=LIF(0.8, 0.4))
    net.double().eval()
    x = torch.rand(12, *net.input_shape, dtype=torch.float64)
    with use_path("eager"):
        yield net, x, net(x).argmax(1)


def attacked(attack, net, x, y, record=None, **settings):
    oracle = Oracle(net, record=record, batch_size=settings.pop("batch_size", None))
    noise = SampleGenerator.from_ids(7, list(range(len(y))))
    return attack.run(oracle, x, y, generator=noise, **settings), oracle


def assert_same(found, expected):
    (one, asked), (two, other) = found, expected
    for name in ("success", "invalid", "iterations", "queries", "gradients", "zero_gradients"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    torch.testing.assert_close(one.loss, two.loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one.x_adv, two.x_adv, rtol=1e-9, atol=1e-9)
    assert asked.health.zero == other.health.zero
    assert asked.health.nonfinite == other.health.nonfinite


WHOLE = [
    PGD(Linf(0.05), steps=12),
    PGD(L0(1), steps=12),
    PGD(Linf(0.02), steps=10, momentum=0.5, restarts=2),
    MultiTargeted(Linf(0.03), steps=20, targets=2),
    APGD(Linf(0.03), steps=16),
    APGD(Linf(0.02), steps=12, loss="dlr", targets=2),
    APGD(L2(0.3), steps=14),
    APGD(L1(0.5), steps=20),
    SAPGD(Linf(0.03), steps=14),
]
PARTLY = [
    PGD(L2(0.3), steps=12),
    PGD(L1(1.0), steps=12),
    SPGD(L0(1), steps=12),
    PGD0(L0(1), steps=12),
]


@pytest.mark.parametrize("attack", WHOLE + PARTLY, ids=lambda a: f"{a.name}-{a.threat.norm}")
@pytest.mark.parametrize("estimator", [None, ASSG(0.4)], ids=str)
def test_captured_iterations_find_the_same(attack, estimator, case):
    attack = replace(attack, estimator=estimator)
    expected = attacked(attack, *case)
    assert int(expected[0].success.sum()) > 0
    recorder = Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = attacked(attack, *case, recorder)
    assert_same(found, expected)
    assert recorder.replayed > recorder.captured >= 1
    # Samples that are broken stay in the batch until it has half its size.
    assert found[1].counts.forwards >= expected[1].counts.forwards


@pytest.mark.parametrize("estimator", [BPTT(Atan(3.0)), HART(0.5), Mix()], ids=str)
def test_every_estimator(estimator, case):
    attack, recorder = APGD(Linf(0.03), steps=14, estimator=estimator), Recorder()
    assert_same(attacked(attack, *case, recorder), attacked(attack, *case))
    assert recorder.replayed > 4


@pytest.mark.parametrize("settings", [{"goal": "loss"}, {"early_drop": False}, {"batch_size": 5}], ids=str)
def test_all_samples_to_the_end(settings, case):
    attack, recorder = PGD(Linf(0.03), steps=12), Recorder()
    expected = attacked(attack, *case, **settings)
    found = attacked(attack, *case, recorder, **settings)
    assert_same(found, expected)
    if "batch_size" not in settings:
        assert found[1].counts == expected[1].counts
        assert recorder.captured == 1
        assert (
            recorder.replayed == 12 - 1 - 2 - 1 + 1
        )  # all but the first, two as they are, the captured one, its check


def test_results_do_not_lie_in_the_memory_of_a_graph(case):
    """The next run of the same graph would write over them."""
    net, x, y = case
    oracle, attack = Oracle(net, record=Recorder()), APGD(Linf(0.03), steps=14, restarts=2)
    one = attack.run(oracle, x, y, generator=SampleGenerator.from_ids(7, list(range(12))))
    kept = one.x_adv.clone()
    attack.run(oracle, x.flip(0), y.flip(0), generator=SampleGenerator.from_ids(8, list(range(12))))
    assert torch.equal(one.x_adv, kept)


def test_the_weights_of_the_day(case):
    """Nothing is kept from one run of an attack to the next: the model may have been trained."""
    net, x, y = case
    attack, recorder = PGD(Linf(0.03), steps=10), Recorder()
    oracle = Oracle(net, record=recorder)
    for _ in range(2):
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.1)
        noise = SampleGenerator.from_ids(7, list(range(12)))
        found = attack.run(oracle, x, y, generator=noise)
        torch.testing.assert_close(found.x_adv, attacked(attack, net, x, y)[0].x_adv, rtol=1e-9, atol=1e-9)
    assert recorder.captured >= 2


class Asking(nn.Module):
    """Looks at its values, which no graph can."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) * (1.0 if float(x.mean()) > 0 else 2.0)


def test_what_cannot_be_captured_runs_as_it_is(case):
    net, x, y = case
    attack, recorder = PGD(Linf(0.03), steps=10), Recorder()
    with pytest.warns(UserWarning, match="goes on without CUDA graphs"):
        found = attacked(attack, Asking(net), x, y, recorder)
    assert_same(found, attacked(attack, net, x, y))
    assert recorder.replayed == 0


@pytest.mark.parametrize("damage", [lambda t: t.mul_(1.01), lambda t: t.zero_()])
def test_a_replay_that_goes_wrong_is_noticed(damage, case):
    class Wrong(Recorder):
        def __call__(self, function, places):
            replay = super().__call__(function, places)

            def wrong():
                replay()
                damage(max((p for p in places if p.is_floating_point()), key=lambda p: p.dim()))

            return wrong

    attack = PGD(Linf(0.03), steps=10)
    with pytest.warns(UserWarning, match="a replay differs"):
        found = attacked(attack, *case, Wrong())
    assert_same(found, attacked(attack, *case))


def test_memory_that_a_capture_lacks_is_no_reason_for_smaller_batches(case):
    net = case[0]

    def exhausted(function, places):
        forward = net.forward

        def failing(*args):
            raise torch.OutOfMemoryError("out of memory in a capture")

        net.forward = failing
        try:
            return function(*places)
        finally:
            net.forward = forward

    attack = PGD(Linf(0.03), steps=10)
    with pytest.warns(UserWarning, match="out of memory in a capture"):
        found = attacked(attack, *case, exhausted)
    assert found[1].room.samples is None
    assert_same(found, attacked(attack, *case))


def test_nothing_is_captured_after_a_failure(case):
    tried = []

    def failing(function, places):
        tried.append(1)
        raise RuntimeError("no")

    attack = APGD(Linf(0.03), steps=40)
    with pytest.warns(UserWarning, match="without CUDA graphs: no"):
        found = attacked(attack, *case, failing)
    assert len(tried) == 1
    assert_same(found, attacked(attack, *case))


def test_random_models_and_modalities_are_left_alone(case):
    net, x, y = case
    recorder = Recorder()
    net.stochastic = True
    attacked(PGD(Linf(0.03), steps=10), net, x, y, recorder)
    assert recorder.captured == 0


def test_events(case):
    net, x, y = case
    x = (x > 0.5).double()
    y = net(x).argmax(1)
    attack, recorder = PGD(EventFlips(3), steps=14), Recorder()
    assert_same(attacked(attack, net, x, y, recorder), attacked(attack, net, x, y))
    assert recorder.replayed > 4


def test_an_evaluation_with_and_without(case, monkeypatch):
    net, x, y = case
    recorder, rows = Recorder(), []
    budgets = {"linf": Budget((0.02, 0.04), 0.04), "l2": Budget((0.3,), 0.3)}
    for record in (None, recorder):
        monkeypatch.setattr(measure, "recorder", lambda wanted, device, record=record: record)
        result = evaluate(net, (x, y), "standard", budgets=budgets, progress=False, check_samples_count=4)
        rows.append([replace(row, size=0.0) for row in result.rows])
    assert rows[0] == rows[1]
    assert recorder.replayed > 50


def test_on_a_cpu_it_is_an_error(case):
    net, x, y = case
    with pytest.raises(ValueError, match=r"cuda_graphs=True.*the model is on cpu"):
        evaluate(net, (x, y), "quick", budgets={"linf": Budget((0.1,), 0.1)}, cuda_graphs=True)


@pytest.mark.gpu
@needs_cuda
def test_a_refused_capture_leaves_cuda_as_it_was(case):
    net, x, y = case
    net, x, y = Asking(net.cuda()), x.cuda(), y.cuda()
    before = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="goes on without CUDA graphs"):
        attacked(PGD(Linf(0.03), steps=10), net, x, y, capture.cuda_graph)
    assert torch.cuda.current_stream() == before
    torch.randn(4, device="cuda")
    torch.cuda.empty_cache()


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("attack", WHOLE, ids=lambda a: f"{a.name}-{a.threat.norm}")
def test_cuda_graphs_find_the_same(attack):
    torch.manual_seed(2)
    net = ConvNet(num_classes=4, input_size=8, channels=(8,), hidden=24, time_steps=3, neuron=LIF(0.8, 0.4))
    net = net.double().eval().cuda()
    x = torch.rand(12, *net.input_shape, dtype=torch.float64, device="cuda")
    y = net(x).argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = attacked(attack, net, x, y, capture.cuda_graph)
    assert_same(found, attacked(attack, net, x, y))
