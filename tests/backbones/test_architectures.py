"""The published architectures, counted by hand."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from sg_lightning.backbones import VGG, ConvNet, SEWResNet, SpikingMLP, WideResNet
from sg_lightning.encoding import Frames
from sg_lightning.neurons import SpikingNeuron


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def order(net: nn.Module) -> str:
    """Spell the sequence of layers: C conv, B norm, L neuron, A average pool, F flatten, D dense."""
    letters = {nn.Conv2d: "C", nn.BatchNorm2d: "B", nn.AvgPool2d: "A", nn.Flatten: "F", nn.Linear: "D"}
    return "".join(
        "L" if isinstance(m, SpikingNeuron) else next(letter for kind, letter in letters.items() if isinstance(m, kind))
        for m in net.modules()
        if isinstance(m, (SpikingNeuron, *letters))
    )


def conv(before: int, after: int, *, bias: bool, side: int = 3) -> int:
    return side * side * before * after + (after if bias else 0)


def norm(width: int) -> int:
    return 2 * width


def dense(before: int, after: int) -> int:
    return before * after + after


def test_vgg11_is_the_one_of_the_sparse_gradient_paper():
    net = VGG("vgg11", num_classes=10, in_channels=3, input_size=32)
    # C64 - AP - C128 - C256 - AP - C512 x 3 - AP - C512 x 2 - FC4096 - FC4096 - FC10; the neuron before the pooling.
    assert order(net) == "CBLA CBLCBLA CBLCBLCBLA CBLCBL F DLDLD".replace(" ", "")
    widths = [3, 64, 128, 256, 512, 512, 512, 512, 512]
    expected = sum(conv(a, b, bias=True) + norm(b) for a, b in pairwise(widths))
    expected += dense(512 * 4 * 4, 4096) + dense(4096, 4096) + dense(4096, 10)
    assert expected == 61_377_034
    assert count(net) == expected
    assert net.time_steps == 8
    assert all(m.kernel_size == (3, 3) and m.padding == (1, 1) for m in net.modules() if isinstance(m, nn.Conv2d))


def test_vgg11_at_48_pixels_and_with_small_head():
    large, small = (count(VGG("vgg11", 10, 3, size, head=(64, 32))) for size in (48, 32))
    assert large - small == 512 * (6 * 6 - 4 * 4) * 64
    assert VGG("vgg11", 10, 1, 8, head=(64,)).features[-2].in_features == 512  # 8 x 8 leaves one pixel


@pytest.mark.parametrize(("size", "side"), [(48, 3), (128, 8), (34, 2)])
def test_vgg_dvs(size, side):
    net = VGG("vgg_dvs", num_classes=10, in_channels=2, input_size=size, encoding=Frames(2))
    assert order(net) == "CBLCBLA CBLCBLA CBLCBLA CBLCBLA FD".replace(" ", "")
    widths = [2, 64, 128, 256, 256, 512, 512, 512, 512]
    expected = sum(conv(a, b, bias=True) + norm(b) for a, b in pairwise(widths)) + dense(512 * side**2, 10)
    assert count(net) == expected
    if size == 34:
        assert net(torch.poisson(torch.rand(1, 2, 2, size, size))).shape == (1, 10)


@pytest.mark.parametrize(
    ("name", "convolutions", "poolings"), [("vgg5", 3, 2), ("vgg11", 8, 3), ("vgg13", 10, 5), ("vgg16", 13, 5)]
)
def test_vgg_depth_is_its_name(name, convolutions, poolings):
    spelled = order(VGG(name, head=(8, 8)))
    assert spelled.count("C") == convolutions
    assert spelled.count("A") == poolings
    assert spelled.count("L") == convolutions + 2
    # The number in the name counts layers with weights; VGG-5 of the SNN literature counts 3 conv and 2 hidden dense.
    assert int(name[3:]) == convolutions + (2 if name == "vgg5" else 3)


def test_wrn_16_4():
    net = WideResNet(16, 4, num_classes=10)
    expected = conv(3, 16, bias=False)
    before = 16
    for width in (64, 128, 256):
        # First block: norm, conv, norm, conv, 1 x 1 skip, mix of two; second block: the same without the skip.
        expected += norm(before) + conv(before, width, bias=False) + norm(width) + conv(width, width, bias=False)
        expected += conv(before, width, bias=False, side=1) + 2
        expected += 2 * norm(width) + 2 * conv(width, width, bias=False) + 2
        before = width
    expected += norm(256) + dense(256, 10)
    # 2,748,890 is the count of the ordinary WRN-16-4; the mixes add 12.
    assert expected == 2_748_890 + 12
    assert count(net) == expected
    assert sum(isinstance(m, SpikingNeuron) for m in net.modules()) == 13
    mixes = [p for name, p in net.named_parameters() if name.endswith("mix")]
    assert len(mixes) == 6
    assert [b.body[0].stride[0] for b in net.blocks] == [1, 1, 2, 1, 2, 1]


def sew_block(before: int, after: int) -> int:
    shortcut = 0 if before == after else conv(before, after, bias=False, side=1) + norm(after)
    return conv(before, after, bias=False) + conv(after, after, bias=False) + 2 * norm(after) + shortcut


def test_sew_resnet18_has_the_weights_of_resnet18():
    net = SEWResNet("sew_resnet18", num_classes=1000, input_size=224)
    expected = conv(3, 64, bias=False, side=7) + norm(64) + dense(512, 1000)
    expected += sum(sew_block(a, b) for a, b in pairwise([64, 64, 64, 128, 128, 256, 256, 512, 512]))
    assert expected == 11_689_512  # the count of the ordinary ResNet-18, to which neurons add nothing
    assert count(net) == expected
    assert order(net).count("C") + order(net).count("D") == 18 + 3  # and the three shortcuts
    assert [b.body[0].stride[0] for b in net.blocks] == [1, 1, 2, 1, 2, 1, 2, 1]
    assert net.stem(torch.rand(1, 1, 3, 224, 224)).shape == (1, 1, 64, 56, 56)
    assert net.time_steps == 4


def test_sew_resnet19_has_the_widths_of_its_paper():
    net = SEWResNet("sew_resnet19", num_classes=10, input_size=32)
    expected = conv(3, 128, bias=False) + norm(128) + dense(512, 256) + dense(256, 10)
    expected += sum(sew_block(a, b) for a, b in pairwise([128, 128, 128, 128, 256, 256, 256, 512, 512]))
    assert count(net) == expected
    assert order(net).count("C") + order(net).count("D") == 19 + 2
    assert [b.body[0].stride[0] for b in net.blocks] == [1, 1, 1, 2, 1, 1, 2, 1]
    sequence = net.stem(net.encode(torch.rand(1, 3, 32, 32)))
    assert [sequence.shape[2:], net.blocks(sequence).shape[2:]] == [(128, 32, 32), (512, 8, 8)]


def test_silent_block_passes_its_input_on():
    net = SEWResNet("sew_resnet19", in_channels=1, input_size=8).eval()
    block = net.blocks[1]
    block.body[4].bias.data.fill_(-100.0)
    x = torch.randint(0, 3, (4, 2, 128, 8, 8)).float()
    assert torch.equal(block(x), x)


def test_wrn_mixes_start_at_one_half():
    net = WideResNet(10, 1, in_channels=1, input_size=8, pool=2)
    assert all(block.mix.tolist() == [0.5, 0.5] for block in net.blocks)


def test_small_networks():
    assert order(ConvNet()) == "CBLACBLAFDLD"
    assert count(ConvNet()) == 9 * 32 + 64 + 9 * 32 * 64 + 128 + dense(64 * 4, 128) + dense(128, 10)
    assert count(SpikingMLP(700, (256, 256), 20)) == dense(700, 256) + dense(256, 256) + dense(256, 20)
    assert count(SpikingMLP(700, (256,), 20, recurrent=True)) == dense(700, 256) + 256 * 256 + dense(256, 20)


@pytest.mark.parametrize(("size", "left"), [(8, 2), (16, 4), (28, 7), (34, 8)])
def test_convnet_pools_odd_sides_down(size, left):
    net = ConvNet(10, 2, size, channels=(4, 6), hidden=5)
    assert net(torch.rand(2, 2, size, size)).shape == (2, 10)
    assert next(m for m in net.modules() if isinstance(m, nn.Linear)).in_features == 6 * left**2


def test_wrn_rounds_odd_sides_up():
    net = WideResNet(10, 1, in_channels=2, input_size=34, pool=9, encoding=Frames(2))
    assert net(torch.poisson(torch.rand(2, 2, 2, 34, 34))).shape == (2, 10)
