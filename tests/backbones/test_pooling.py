import pytest
import torch
from torch import nn

from sg_lightning.backbones import VGG, ConvNet
from sg_lightning.backbones.pooling import AvgPool2

torchs = nn.AvgPool2d(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 4, 8, 6), (2, 1, 7, 5), (1, 3, 2, 2), (5, 2, 3)])
def test_it_is_average_pooling(shape, dtype):
    spikes = (torch.rand(shape, dtype=torch.float32) < 0.4).to(dtype)
    assert torch.equal(AvgPool2()(spikes), torchs(spikes))
    values = torch.randn(shape).to(dtype)
    difference = (AvgPool2()(values).double() - torchs(values.double())).abs().max()
    assert difference <= torch.finfo(dtype).eps * values.abs().max()


@pytest.mark.parametrize("shape", [(3, 4, 8, 6), (2, 1, 7, 5)])
def test_gradients_of_all_orders(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found, expected = ([], [])
    for pool, into in ((AvgPool2(), found), (torchs, expected)):
        means = pool(x)
        (first,) = torch.autograd.grad(means.pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x)
        into += [means, first, second]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradgradcheck(AvgPool2(), torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True))


def test_other_layouts_sizes_and_transforms():
    x = torch.rand(2, 3, 8, 8)
    last = x.to(memory_format=torch.channels_last)
    assert AvgPool2()(last).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(AvgPool2()(last), torchs(x))
    torch.testing.assert_close(AvgPool2()(x[..., ::2]), torchs(x[..., ::2]))
    torch.testing.assert_close(torch.vmap(AvgPool2())(x.unsqueeze(1)), torchs(x).unsqueeze(1))
    jacobian = torch.func.jacrev(AvgPool2())(x[:1, :1, :2, :2])
    assert torch.equal(jacobian.flatten(), torch.full((4,), 0.25))
    with pytest.raises(RuntimeError, match="too small"):
        AvgPool2()(torch.rand(2, 3, 1, 8))


def test_it_keeps_nothing_for_the_backward_pass():
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        AvgPool2()(x)
    assert not kept


@pytest.mark.parametrize("network", [lambda: ConvNet(), lambda: VGG("vgg5", in_channels=1, input_size=8, head=(16,))])
def test_networks_use_it(network):
    assert any(isinstance(layer, AvgPool2) for layer in network().modules())
