import pytest
import torch
from torch import nn

from sg_lightning.attacks import APGD, PGD, Entry, Oracle, Suite, verify
from sg_lightning.attacks.folding import folded
from sg_lightning.backbones import VGG, ConvNet, WideResNet
from sg_lightning.evaluation.engine import RobustnessRun
from sg_lightning.threats import Linf


def trained(net, x):
    """Give batch norms statistics of their own, so that a wrong fold shows."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.momentum = 1.0
    net.train()(x)
    return net.eval()


@pytest.mark.parametrize(
    ("build", "merged"),
    [
        (lambda: ConvNet(channels=(4, 8), hidden=16), 2),
        (lambda: VGG("vgg5", in_channels=1, input_size=8, time_steps=3, head=(16,)), 3),
        (lambda: WideResNet(10, 1, in_channels=1, input_size=8, pool=2, time_steps=2), 3),
    ],
)
def test_the_function_is_the_same_and_the_model_comes_back(build, merged):
    torch.manual_seed(1)
    x = torch.rand(6, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    net = trained(build().double(), x.detach())
    tree, state = list(net.named_modules()), {k: v.clone() for k, v in net.state_dict().items()}
    plain = net(x)
    (grad,) = torch.autograd.grad(plain.square().sum(), x)
    with folded(net):
        assert sum(isinstance(module, nn.Identity) for module in net.modules()) == merged
        inside = net(x)
        (folded_grad,) = torch.autograd.grad(inside.square().sum(), x)
    torch.testing.assert_close(inside, plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(folded_grad, grad, rtol=1e-9, atol=1e-12)
    with pytest.raises(KeyboardInterrupt), folded(net):
        raise KeyboardInterrupt
    assert list(net.named_modules()) == tree
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def stack():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 10)).eval()


class Backwards(nn.Sequential):
    def forward(self, x):
        return self[0](x)


def left_alone(net):
    before = list(net.modules())
    with folded(net):
        return list(net.modules()) == before


def test_layers_that_cannot_be_merged_are_left_alone():
    assert not left_alone(stack())
    assert left_alone(stack().train())
    hooked = stack()
    hooked[0].register_forward_hook(lambda *_: None)
    assert left_alone(hooked)
    assert left_alone(nn.utils.parametrizations.weight_norm(stack()[0]))
    assert left_alone(Backwards(*stack()))
    batch_statistics = stack()
    batch_statistics[1] = nn.BatchNorm2d(2, track_running_stats=False).eval()
    assert left_alone(batch_statistics)
    assert left_alone(torch.compile(stack(), backend="eager"))
    with folded(lambda x: x):
        pass


def test_attacks_work_on_the_folded_model_and_are_judged_on_the_model_as_it_is(monkeypatch):
    x = torch.rand(8, 1, 8, 8)
    net = trained(ConvNet(channels=(4, 8), hidden=16), x)
    y = net(x).argmax(1)
    seen = []
    forward = Oracle._forward
    monkeypatch.setattr(
        Oracle, "_forward",
        lambda self, *x: (seen.append(any(isinstance(m, nn.Identity) for m in self.modules)), forward(self, *x))[1],
    )  # fmt: skip
    oracle, threat = Oracle(net), Linf(0.1)
    found = APGD(threat, steps=5).run(oracle, x, y)
    assert all(seen)
    seen.clear()
    verdict = verify(oracle, threat, x, found.x_adv, y)
    assert seen == [False]
    assert bool(verdict.inside.all())


def test_attacks_of_an_evaluation_work_on_the_folded_model(monkeypatch):
    """Although the oracle has been entered before, for all attacks; what is outside of them is asked as it is."""
    x = torch.rand(8, 1, 8, 8)
    net = trained(ConvNet(channels=(4, 8), hidden=16), x)
    seen = {"search": [], "other": []}
    place, search, forward = ["other"], PGD._search, Oracle._forward

    def searching(*args):
        place[0] = "search"
        search(*args)
        place[0] = "other"

    def asked(self, *args):
        seen[place[0]].append(any(isinstance(m, nn.Identity) for m in self.modules))
        return forward(self, *args)

    monkeypatch.setattr(PGD, "_search", searching)
    monkeypatch.setattr(Oracle, "_forward", asked)
    suite = Suite("one", (Entry(Linf(0.1), (PGD(Linf(0.1), steps=3),), True),), control=False)
    RobustnessRun(Oracle(net), suite).batch(x, net(x).argmax(1), range(8))
    assert len(seen["search"]) > 2
    assert all(seen["search"])
    assert len(seen["other"]) >= 2  # clean inputs, and the verdict
    assert not any(seen["other"])
