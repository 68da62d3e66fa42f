"""Measures of the input gradient: of the right function, everywhere, without a trace."""

import math

import pytest
import torch
from torch import nn

from sg_lightning.backbones import ConvNet
from sg_lightning.metrics import gradient_sparsity
from sg_lightning.neurons import LIF
from sg_lightning.objectives import input_gradient_metrics


def test_linear_model_in_closed_form():
    net = nn.Linear(3, 2, bias=False).double()
    net.weight.data = torch.tensor([[3.0, 0.0, -4.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    x = torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64)
    p = 1 / (1 + math.exp(-(0.3 - 1.2)))
    for output in ("margin", "softmax"):  # the same with two classes
        measures = input_gradient_metrics(net, x, torch.tensor([0]), output=output)
        assert measures["l1"].item() == pytest.approx(7 * p * (1 - p))
        assert measures["l2"].item() == pytest.approx(5 * p * (1 - p))
        assert measures["linf"].item() == pytest.approx(4 * p * (1 - p))
        assert measures["zero_share"].item() == pytest.approx(1 / 3)
        assert measures["l1_over_l2"].item() == pytest.approx(1.4)


def test_outputs_differ_with_more_classes():
    net, x, y = nn.Linear(6, 4), torch.rand(5, 6), torch.randint(4, (5,))
    margin, softmax = (input_gradient_metrics(net, x, y, output=output)["l1"] for output in ("margin", "softmax"))
    assert margin.shape == (5,)
    assert not torch.allclose(margin, softmax)


def test_no_trace_in_any_mode():
    net = ConvNet(4, 1, 4, channels=(6,), hidden=12, neuron=LIF(0.9, threshold=0.3))
    x, y = torch.rand(6, 1, 4, 4), torch.randint(4, (6,))
    for _ in range(20):
        net(x)
    net.eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    plain = input_gradient_metrics(net, x, y)
    assert plain["l1"].max() > 0
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            got = input_gradient_metrics(net, x.clone(), y.clone())
        assert all(torch.equal(got[k], plain[k]) for k in plain)
    assert not any(v.requires_grad for v in plain.values())
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert not x.requires_grad


def test_modalities_are_one_vector():
    image, sound = nn.Linear(4, 3), nn.Linear(2, 3)
    x, y = {"image": torch.rand(5, 2, 2), "sound": torch.rand(5, 2)}, torch.randint(3, (5,))
    got = input_gradient_metrics(lambda v: image(v["image"].flatten(1)) + sound(v["sound"]), x, y, output="softmax")
    a, b = x["image"].clone().requires_grad_(), x["sound"].clone().requires_grad_()
    p = (image(a.flatten(1)) + sound(b)).softmax(1).gather(1, y[:, None]).sum()
    g = torch.cat([t.flatten(1) for t in torch.autograd.grad(p, (a, b))], 1)
    for key, value in gradient_sparsity(g).items():
        assert torch.allclose(got[key], value, atol=1e-6)


def test_bad_input():
    net = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.1"):
        input_gradient_metrics(net, torch.rand(2, 3), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="do not depend on x"):
        input_gradient_metrics(lambda x: net(torch.ones(2, 3)), torch.rand(2, 3), torch.tensor([0, 1]))
