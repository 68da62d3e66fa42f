import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser, Namespace
from snntorch import surrogate as theirs

from sg_lightning.neurons import LIF, Surrogate, surrogates
from sg_lightning.neurons.surrogates import (
    SURROGATES,
    Atan,
    Exponential,
    FastSigmoid,
    Gaussian,
    Rectangular,
    Sigmoid,
    StraightThrough,
    Triangular,
)

SMOOTH = [Atan(2.0), Atan(0.7), FastSigmoid(25.0), FastSigmoid(3.0), Sigmoid(4.0), Sigmoid(25.0), Gaussian(0.5)]
ROUGH = [Triangular(1.0), Triangular(0.4), Rectangular(1.0), Exponential(2.0, 0.3), StraightThrough()]


def autograd_derivative(function, z):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(function(z).sum(), z)[0]


@pytest.mark.parametrize(
    ("ours", "snntorch_function"),
    [
        (Atan(), theirs.atan()),
        (Atan(3.5), theirs.atan(3.5)),
        (FastSigmoid(), theirs.fast_sigmoid()),
        (FastSigmoid(7.0), theirs.fast_sigmoid(7)),
        (Sigmoid(), theirs.sigmoid()),
        (Sigmoid(4.0), theirs.sigmoid(4)),
        (StraightThrough(), theirs.straight_through_estimator()),
    ],
    ids=str,
)
def test_same_function_as_snntorch(ours, snntorch_function):
    z = torch.linspace(-2, 2, 401, dtype=torch.float64)
    # snnTorch emits float32 spikes, so its upstream gradient is rounded to float32.
    torch.testing.assert_close(ours.derivative(z), autograd_derivative(snntorch_function, z), rtol=1e-12, atol=1e-300)


def test_snntorchs_triangular_is_another_function():
    z = torch.tensor([-0.5, 0.5])
    assert autograd_derivative(theirs.triangular(), z).tolist() == [1.0, -1.0]
    assert Triangular(1.0).derivative(z).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("rule", "z", "value"),
    [
        (Triangular(2.0), -0.5, 1.5 / 4),
        (Triangular(1.0), 1.0, 0.0),
        (Atan(2.0), 0.0, 1.0),
        (Atan(2.0), 1 / math.pi, 0.5),
        (FastSigmoid(4.0), 0.25, 0.25),
        (Sigmoid(4.0), 0.0, 1.0),
        (Rectangular(0.5), 0.24, 2.0),
        (Rectangular(0.5), 0.25, 0.0),
        (Gaussian(0.5), 0.5, math.exp(-0.5) / (0.5 * math.sqrt(2 * math.pi))),
        (Exponential(2.0, 0.3), -0.5, 0.3 / math.e),
        (StraightThrough(), 9.0, 1.0),
    ],
    ids=str,
)
def test_values_by_hand(rule, z, value):
    assert rule.derivative(torch.tensor([z], dtype=torch.float64)).item() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("rule", [*SMOOTH, *ROUGH], ids=str)
def test_area_is_one_or_what_the_formula_says(rule):
    z = torch.linspace(-400, 400, 4_000_001, dtype=torch.float64)
    area = torch.trapezoid(rule.derivative(z), z).item()
    formulas = {
        FastSigmoid: lambda: 2 / rule.slope,
        Exponential: lambda: 2 * rule.peak / rule.slope,
        StraightThrough: lambda: 800.0,
    }
    expected = formulas.get(type(rule), lambda: 1.0)()
    assert area == pytest.approx(expected, rel=3e-3)


@pytest.mark.parametrize("rule", SMOOTH, ids=str)
def test_second_derivative_is_that_of_the_derivative(rule):
    z = torch.linspace(-3, 3, 500, dtype=torch.float64)  # an even number of points: 0, FastSigmoid's kink, is none
    torch.testing.assert_close(rule.second_derivative(z), autograd_derivative(rule.derivative, z), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", ROUGH, ids=str)
def test_no_second_derivative_names_the_surrogate(rule):
    with pytest.raises(RuntimeError, match=rf"{type(rule).__name__}.*atan, fast_sigmoid, gaussian, sigmoid"):
        rule.second_derivative(torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", [*SMOOTH, *ROUGH, Sigmoid(1e4), FastSigmoid(1e6), Atan(1e6), Gaussian(1e-3)], ids=str)
def test_finite_everywhere(rule, dtype):
    largest = torch.finfo(dtype).max / 1e8
    z = torch.tensor([0.0, 1e-30, 1.0, 88.0, 200.0, 1e4, 1e10, largest], dtype=dtype)
    z = torch.cat([z, -z])
    value = rule.derivative(z)
    assert torch.isfinite(value).all()
    assert (value >= 0).all()
    assert torch.equal(value[:8], value[8:])  # even
    if type(rule) in {type(r) for r in SMOOTH}:
        assert torch.isfinite(rule.second_derivative(z)).all()


def test_snntorchs_sigmoid_is_nan_where_ours_is_finite():
    z = torch.tensor([-4.0])
    assert torch.isnan(autograd_derivative(theirs.sigmoid(25), z)).item()
    assert Sigmoid(25.0).derivative(z).item() == pytest.approx(25 * math.exp(-100), rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(SURROGATES)), st.floats(0.01, 50), st.floats(-5, 5))
def test_derivative_leaves_its_input_alone(name, width, value):
    cls = SURROGATES[name]
    rule = cls() if cls is StraightThrough else cls(width)
    z = torch.full((4,), value)
    before = z.clone()
    assert rule.derivative(z).shape == z.shape
    assert torch.equal(z, before)


def test_from_name_builds_every_surrogate():
    assert surrogates.from_name("atan", alpha=3) == Atan(3.0)
    assert {name: type(surrogates.from_name(name)) for name in SURROGATES} == SURROGATES
    assert LIF(surrogate="sigmoid").surrogate == Sigmoid()


def test_bad_names_and_widths():
    with pytest.raises(ValueError, match=r"unknown surrogate 'tanh'.*atan, exponential, fast_sigmoid"):
        surrogates.from_name("tanh")
    with pytest.raises(ValueError, match="'atan' takes alpha, got slope"):
        surrogates.from_name("atan", slope=2)
    with pytest.raises(ValueError, match="'straight_through' takes no parameter, got width"):
        surrogates.from_name("straight_through", width=2)
    for value in (0, -1.0, math.inf, math.nan, "x", None, True):
        with pytest.raises(ValueError, match="Atan: alpha must be a finite number above 0"):
            Atan(value)


def test_immutable_and_compared_by_value():
    assert Triangular(1) == Triangular(1.0)
    assert hash(Triangular(1)) == hash(Triangular(1.0))
    with pytest.raises(AttributeError):
        Triangular(1.0).width = 2.0
    assert isinstance(Triangular(), Surrogate)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ([], Triangular(1.0)),
        (["--neuron.surrogate=atan"], Atan(2.0)),
        (["--neuron.surrogate=sg_lightning.neurons.surrogates.Atan", "--neuron.surrogate.alpha=3"], Atan(3.0)),
        (['--neuron.surrogate={"class_path": "sg_lightning.neurons.surrogates.StraightThrough"}'], StraightThrough()),
    ],
)
def test_configs_name_a_surrogate_or_give_its_class(written, meant):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LIF, "neuron")
    config = parser.parse_args(["--neuron=sg_lightning.neurons.LIF", *written])
    again = parser.parse_string(parser.dump(config))  # what a saved config gives back
    for read in (config, again):
        assert LIF(**_init_args(read.neuron.init_args)).surrogate == meant


def _init_args(arguments):
    values = dict(vars(arguments))
    if not isinstance(values["surrogate"], str):
        surrogate = values["surrogate"]
        cls = getattr(surrogates, surrogate.class_path.rsplit(".", 1)[1])
        values["surrogate"] = cls(**vars(surrogate.get("init_args") or Namespace()))
    return values
