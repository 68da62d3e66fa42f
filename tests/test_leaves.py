"""The leaf modules: domains, inputs and per-sample noise."""

import math

import pytest
import torch

from sg_lightning import inputs
from sg_lightning.domains import Binary, Box, Counts, Domain
from sg_lightning.sampling import SampleGenerator, as_sample_generator


def test_domains_accept_what_is_legal():
    Box().check(torch.rand(3, 2))
    Counts().check(torch.tensor([[0.0, 7.0]]))
    Binary().check(torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize(
    ("domain", "x", "message"),
    [
        (Box(), torch.tensor([[1.5]]), r"values in \[1.5, 1.5\] but its domain is Box \[0, 1\].*normalise inside"),
        (Box(), torch.tensor([[math.nan, 0.0]]), "holds 1 NaN or infinite"),
        (Box(), torch.tensor([[1]]), "dtype torch.int64; convert it to float32"),
        (Counts(), torch.tensor([[-1.0]]), "domain is Counts"),
        (Counts(), torch.tensor([[0.5]]), "not integers"),
        (Binary(), torch.tensor([[2.0]]), "domain is Binary"),
    ],
)
def test_domains_refuse_with_the_cure(domain, x, message):
    with pytest.raises(ValueError, match=message):
        domain.check(x, "images")


def test_domain_walls():
    assert torch.equal(Counts().clip(torch.tensor([-2.0, 300.0])), torch.tensor([0.0, 300.0]))
    assert Box(-1, 1).width == 2
    assert Box().contains(torch.tensor([[0.5, 1.0], [0.5, 1.1]])).tolist() == [True, False]
    assert Binary().contains(torch.tensor([[0.0, 1.0], [0.5, 1.0]])).tolist() == [True, False]
    with pytest.raises(ValueError, match="low < high"):
        Domain(1.0, 1.0)


def test_inputs_treat_tensor_and_dict_alike():
    x = {"image": torch.rand(3, 2), "audio": torch.rand(3, 4, 5)}
    y = inputs.where(torch.tensor([True, False, True]), inputs.apply(torch.zeros_like, x), x)
    assert float(y["audio"][0].sum()) == 0
    assert torch.equal(y["image"][1], x["image"][1])
    part = inputs.select(x, torch.tensor([2, 0]))
    assert torch.equal(part["image"][1], x["image"][0])
    target = inputs.detached(x)
    inputs.assign(target, torch.tensor([1]), inputs.apply(torch.ones_like, inputs.select(x, torch.tensor([1]))))
    assert float(target["image"][1].sum()) == 2
    assert inputs.batch_size(x) == 3
    assert inputs.rebuild(x, inputs.tensors(x)).keys() == x.keys()


def test_noise_belongs_to_the_sample_not_to_the_batch():
    like = torch.zeros(8, 3, 5)
    whole = SampleGenerator.from_ids(0, range(8))
    some = torch.tensor([6, 1])
    for draw in ("uniform", "normal"):
        assert torch.equal(getattr(whole, draw)(like)[some], getattr(whole.select(some), draw)(like[:2]))
    assert torch.equal(SampleGenerator.from_ids(0, [6, 1]).uniform(like[:2]), whole.uniform(like)[some])


def test_noise_streams_are_independent_and_leave_global_random_state_alone():
    like = torch.zeros(64, 512)
    before = torch.get_rng_state()
    base = SampleGenerator.from_ids(3, range(64))
    streams = [
        base,
        base.fork("start"),
        base.fork("start", 1),
        base.fork("control"),
        SampleGenerator.from_ids(4, range(64)),
    ]
    correlation = torch.corrcoef(torch.stack([s.uniform(like).flatten() for s in streams]))
    assert float((correlation - torch.eye(len(streams))).abs().max()) < 0.02  # 3.6 standard errors of 32,768 pairs
    assert torch.equal(before, torch.get_rng_state())


def test_noise_has_the_right_moments():
    generator = SampleGenerator.from_ids(0, range(200))
    uniform = generator.uniform(torch.zeros(200, 1000), -1.0, 3.0)
    normal = generator.normal(torch.zeros(200, 1000))
    assert float(uniform.min()) >= -1
    assert float(uniform.max()) < 3
    assert float(uniform.mean()) == pytest.approx(1.0, abs=0.02)
    assert float(uniform.var()) == pytest.approx(16 / 12, rel=0.02)
    assert float(normal.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(normal.var()) == pytest.approx(1.0, rel=0.02)
    assert float((normal**4).mean()) == pytest.approx(3.0, rel=0.05)
    # Within a sample, too: neighbouring elements are uncorrelated.
    assert abs(float((normal[:, 1:] * normal[:, :-1]).mean())) < 0.01


def test_generators_of_either_kind():
    torch.manual_seed(5)
    first = as_sample_generator(None, 4).keys
    torch.manual_seed(5)
    assert torch.equal(first, as_sample_generator(None, 4).keys)
    assert len(as_sample_generator(torch.Generator().manual_seed(1), 4)) == 4
    with pytest.raises(ValueError, match="keys for 2 samples, the batch has 3"):
        as_sample_generator(SampleGenerator.from_ids(0, [0, 1]), 3)
