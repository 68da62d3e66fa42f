"""The simulated event camera against a loop over pixels and against arithmetic, and the digits that it sees."""

import math

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

from sg_lightning.datamodules import Digits, SaccadeDigits
from sg_lightning.datamodules.digits import embedded_digits
from sg_lightning.datamodules.event_camera import EventCamera
from sg_lightning.datamodules.saccade_digits import _enlarging, recorded
from sg_lightning.evaluation import evaluate
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import Budget, make_threat


def keys(count):
    return SampleGenerator.from_ids(0, torch.arange(count))


def ramp(slope, steps=10, height=1, width=1):
    """Images whose logarithm changes by ``slope`` from one to the next."""
    return [torch.full((1, height, width), slope * k, dtype=torch.float64) for k in range(steps + 1)]


def everything(samples):
    return samples.__getitems__(range(len(samples)))


@pytest.fixture(scope="module")
def data():
    return SaccadeDigits()


# --- camera ---


@pytest.mark.parametrize("sign", [1, -1])
def test_a_steady_change_sends_an_event_at_every_threshold(sign):
    camera = EventCamera(threshold=0.25, mismatch=0.0, refractory_us=0.0, noise_hz=0.0)
    (events,) = camera.record(ramp(sign * 0.1), 1000.0, keys(1))
    assert events.t.tolist() == [2500, 5000, 7500, 10_000]
    assert events.p.tolist() == [int(sign > 0)] * 4
    (fast,) = camera.record(ramp(sign * 0.8, 1), 1000.0, keys(1))  # three crossings between two images
    assert np.allclose(fast.t, [312.5, 625, 937.5], atol=0.6)


def test_a_pixel_is_silent_for_the_refractory_time_and_remembers_the_level():
    camera = EventCamera(threshold=0.25, mismatch=0.0, refractory_us=3000.0, noise_hz=0.0)
    (events,) = camera.record(ramp(0.1), 1000.0, keys(1))
    assert events.t.tolist() == [2500, 7500]  # at 5,000 and 10,000 the last event is 2,500 us ago


def test_nothing_moves_nothing_is_seen():
    camera = EventCamera(noise_hz=0.0)
    (events,) = camera.record(ramp(0.0, height=4, width=4), 1000.0, keys(1))
    assert len(events) == 0


def test_thresholds_belong_to_the_camera_and_scatter_as_wanted():
    camera = EventCamera(threshold=0.25, mismatch=0.03, refractory_us=0.0, noise_hz=0.0)
    found = {}
    for sign in (1, -1):
        (events,) = camera.record(ramp(sign * 0.001, 400, 40, 40), 1000.0, keys(1))
        place, first = np.unique(events.y * 40 + events.x, return_index=True)
        assert len(place) == 1600
        found[sign] = events.t[first] / 1e6  # the change at the first event is the threshold
        assert abs(found[sign].mean() - 0.25) < 0.003
        assert abs(found[sign].std() - 0.03) < 0.002
    assert abs(np.corrcoef(found[1], found[-1])[0, 1]) < 0.1  # each polarity has its own
    (again,) = camera.record(ramp(0.001, 400, 40, 40), 1000.0, SampleGenerator.from_ids(9, [5]))
    assert np.array_equal(again.t[np.unique(again.y * 40 + again.x, return_index=True)[1]] / 1e6, found[1])


def test_noise_is_poisson_with_either_polarity():
    camera = EventCamera(noise_hz=20.0)
    scenes = [torch.zeros(30, 8, 8, dtype=torch.float64)] * 11
    events = camera.record(scenes, 50_000.0, keys(30))  # half a second
    number = np.array([np.bincount(e.y * 8 + e.x, minlength=64) for e in events])
    assert abs(number.mean() - 10) < 0.3
    assert abs(number.var() - 10) < 1.0
    assert abs(np.concatenate([e.p for e in events]).mean() - 0.5) < 0.02
    time = np.concatenate([e.t for e in events])
    assert abs(time.mean() - 250_000) < 5_000
    assert time.max() <= 500_000
    assert all((np.diff(e.t) >= 0).all() for e in events)


def test_the_camera_is_that_of_a_loop_over_pixels():
    rng = np.random.default_rng(3)
    logs = np.cumsum(rng.normal(0, 0.25, (40, 2, 3, 4)), axis=0)
    camera = EventCamera(threshold=0.2, mismatch=0.0, refractory_us=700.0, noise_hz=0.0)
    found = camera.record([torch.from_numpy(z) for z in logs], 1000.0, keys(2))
    for scene in range(2):
        wanted = []
        for y in range(3):
            for x in range(4):
                level, last = logs[0, scene, y, x], -math.inf
                for k in range(1, 40):
                    before, now = logs[k - 1, scene, y, x], logs[k, scene, y, x]
                    while abs(now - level) >= 0.2:
                        up = now > level
                        level += 0.2 if up else -0.2
                        time = (k - 1 + min(max((level - before) / (now - before), 0), 1)) * 1000
                        if time - last >= 700:
                            wanted.append((round(time), x, y, int(up)))
                            last = time
        got = found[scene]
        assert len(wanted) > 50
        assert sorted(zip(got.t.tolist(), got.x.tolist(), got.y.tolist(), got.p.tolist(), strict=True)) == sorted(
            wanted
        )


# --- digits ---


def test_digits_are_enlarged_by_cubic_splines():
    matrix = _enlarging(8, 1.7).numpy()
    spline = BSpline.basis_element([-2, -1, 0, 1, 2], extrapolate=False)
    place = (np.arange(16) + 0.5 - 1.7 - 0.25) / 1.5 - 0.5
    wanted = np.nan_to_num(spline(place[:, None] - np.arange(8)))
    assert np.allclose(matrix, wanted, atol=1e-12)
    inside = (place >= 1) & (place <= 6)
    assert np.allclose(matrix[inside].sum(1), 1)


def test_what_a_batch_holds(data):
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == (64, 6, 2, 16, 16) == (64, *data.input_shape)
    assert (data.in_channels, data.input_size, data.time_steps, data.num_classes) == (2, 16, 6, 10)
    assert y.dtype == torch.int64
    data.domain.check(x)
    assert x.max() > 2
    events = x.sum((1, 2, 3, 4))
    assert 1000 < events.min() < events.max() < 2500
    assert abs(x[:, :, 1].sum() / x.sum() - 0.5) < 0.05  # the path is closed: what came goes
    for options, shape, high in (
        ({"values": "binary"}, (6, 2, 16, 16), 1),
        ({"merge_polarity": True, "time_steps": 3}, (3, 1, 16, 16), 100),
    ):
        other = SaccadeDigits(**options)
        sample, _ = other.test_set[0]
        assert sample.shape == shape
        assert sample.max() <= high
        other.domain.check(sample.unsqueeze(0))


def test_images_and_parts_are_those_of_digits(data):
    still = Digits()
    assert torch.equal(data.test_set.labels, still.test_set.labels)
    assert torch.equal(data.train_set.labels, still.train_set.labels)
    assert torch.equal(data.val_set.labels, still.val_set.labels)
    x, _ = everything(data.test_set)
    image, _ = everything(still.test_set)
    drawn = x.sum((1, 2))
    # Where a digit has ink, its edges pass: many events; the outermost columns see little.
    assert drawn[:, 4:12, 4:12].mean() > 3 * drawn[:, :, [0, 15]].mean()
    ink = torch.nn.functional.interpolate(image, 16, mode="bilinear").squeeze(1).flatten(1)
    own = [z - z.mean(0) for z in (drawn.flatten(1), ink)]  # what tells an image from the mean of all
    match = torch.corrcoef(torch.cat(own))[: len(x), len(x) :]
    assert match.diagonal().mean() > 0.1
    assert match.mean().abs() < 0.02


def test_events_depend_on_the_number_of_the_image_only(data):
    again = SaccadeDigits(seed=3, batch_size=7, num_workers=0)
    assert torch.equal(everything(again.test_set)[0], everything(data.test_set)[0])
    images = embedded_digits()[0]
    few, fewer = recorded(images[100:110], EventCamera(), 100), recorded(images[104:106], EventCamera(), 104)
    for name in "xypt":
        assert np.array_equal(getattr(few[4], name), getattr(fewer[0], name))
    other = recorded(images[104:105], EventCamera(), 105)[0]
    assert not np.array_equal(other.t, fewer[0].t)


@pytest.fixture(scope="module")
def linear(data):
    """Logistic regression on the events of each pixel, as a module."""
    models = pytest.importorskip("sklearn.linear_model")
    x, y = everything(data.train_set)
    fitted = models.LogisticRegression(C=1.0, max_iter=500).fit((x.sum((1, 2)).flatten(1) / 10).numpy(), y.numpy())
    layer = torch.nn.Linear(256, 10)
    layer.weight.data = torch.from_numpy(fitted.coef_).float() / 10
    layer.bias.data = torch.from_numpy(fitted.intercept_).float()

    class Pixels(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            weight = torch.linspace(0.9, 1.1, x.shape[1])  # so that the time of an event matters
            return self.layer(torch.einsum("btcyx,t->byx", x, weight).flatten(1))

    return Pixels().eval()


def test_a_linear_classifier_reads_the_digits(data, linear):
    x, y = everything(data.test_set)
    with torch.no_grad():
        assert (linear(x).argmax(1) == y).float().mean() > 0.9


@pytest.mark.parametrize("suite", ["quick", "standard"])
def test_suites_mean_something_on_events(data, linear, suite, tmp_path):
    budgets = {norm: Budget((budget.headline,), budget.headline) for norm, budget in data.budgets.items()}
    result = evaluate(
        linear,
        data,
        suite,
        budgets=budgets,
        max_samples=4,
        check_samples_count=1,
        progress=False,
        keep="all",
        out=tmp_path,
    )
    assert result.clean == 1
    assert result.accuracy("flips", budgets["flips"].headline) == 0  # a linear model, 5 % of its events
    x, _ = data.test_set.__getitems__(range(4))
    assert x.max() > 4
    for norm, budget in budgets.items():
        threat = make_threat(norm, budget.headline, data.domain)
        found = torch.load(tmp_path / "adversarial" / f"{norm}.pt", weights_only=True)
        x_adv, success = found["x_adv"].float(), found["success"]
        assert torch.equal(x_adv, x_adv.round())
        assert bool(threat.contains(x_adv, x).all())
        assert success.float().mean() == 1 - result.accuracy(norm, budget.headline)
        # Nothing is cut at one: what a cell held is there, but for what the budget takes or moves.
        assert (x_adv > 1).sum() > 0.9 * (x > 1).sum()


def test_every_budget_is_a_threat(data):
    x, _ = next(iter(data.val_dataloader()))
    for norm, budget in data.budgets.items():
        assert budget.reason
        for eps in budget.eps:
            threat = make_threat(norm, eps, data.domain)
            threat.check(x)
            assert (threat.limits(x) >= 1).all()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="time_steps must be an integer >= 1"):
        SaccadeDigits(time_steps=0)
    with pytest.raises(ValueError, match="val_fraction"):
        SaccadeDigits(val_fraction=0.0)
