"""Objects become plain data and the same objects again; what a recipe may name."""

import copy
import functools
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import snntorch as snn
import torch
from torch import nn

from sg_lightning import recipes
from sg_lightning.attacks import APGD, ASSG, BPTT, FGSM, HART, PGD, RFGSM, InTurn, OnModality, RandomNoise
from sg_lightning.attacks.estimators import Mix
from sg_lightning.backbones import VGG, ConvNet, SEWResNet, SpikingMLP, WideResNet
from sg_lightning.domains import Binary, Box, Counts, Domain
from sg_lightning.encoding import Frames, Latency, Poisson
from sg_lightning.neurons import LIF, LeakyIntegrator, RecurrentLIF, from_snntorch, surrogates
from sg_lightning.threats import L0, L1, L2, EventFlips, Linf, Modality
from sg_lightning.threats.joint import Joint

VALUES = [
    Domain(0.0, 2.0), Box(-1, 1), Counts(), Counts(5), Binary(), *[make() for make in surrogates.SURROGATES.values()],
    surrogates.Atan(3.5), Linf("8/255"), Linf(0.1, Box(0, 2)), L2(0.5), L1("12"), L0(3), EventFlips(2, mode="add"),
    Joint({"image": Linf("1/255"), "events": EventFlips(3, Counts())}),
    Joint({"image": Linf("1/255"), "events": L0(3)}, "1/2", "joint_both"), Modality("audio", EventFlips("2%")),
    OnModality(Modality("audio", EventFlips("2%")), PGD(EventFlips(1), steps=3, estimator=HART())),
    InTurn(Joint({"a": Linf(0.1), "b": L2(0.5)}), (PGD(Linf(0.1)), APGD(L2(0.1), estimator=ASSG())), rounds=3),
    FGSM(L2(1.0), loss="margin"), RFGSM(Linf(0.1), alpha="1/255"), PGD(L0(2), steps=3, restarts=2), RandomNoise(L1(2.0)),
    PGD(Linf(0.1), estimator=Mix((HART(0.5), BPTT(surrogates.Atan(3.0))))), APGD(L2(0.5), estimator=ASSG(a=0.3)),
]  # fmt: skip
NETWORKS = [
    ConvNet(3, channels=(4, 6), hidden=5, encoding=Poisson(3), neuron=LIF(0.9, surrogate=surrogates.Gaussian(0.7))),
    ConvNet(3, 2, channels=[4], time_steps=2, mean=(0.1, 0.2), std=np.float64(0.5)),
    VGG("vgg5", 7, 1, 4, head=(6,), encoding=Latency(3), neuron=LIF(beta=0.5, learn_beta=True, reset="subtract")),
    WideResNet(10, 1, 5, input_size=8, pool=2, time_steps=1, spiking=False),
    SEWResNet("sew_resnet19", 3, 2, 4, encoding=Frames(), time_steps=2),
    SpikingMLP(6, (4, 3), 5, time_steps=4, recurrent=True, readout=LeakyIntegrator(0.8, readout="max")),
]


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_settings_come_back_equal(value):
    again = recipes.build(recipes.describe(value))
    assert type(again) is type(value)
    assert again == value


@pytest.mark.parametrize("net", NETWORKS, ids=lambda net: type(net).__name__)
def test_networks_come_back_with_their_parts(net, tmp_path):
    torch.save(recipes.recipe(net), tmp_path / "recipe.pt")
    again = recipes.build(torch.load(tmp_path / "recipe.pt", weights_only=True))
    assert str(again) == str(net)
    again.load_state_dict(net.state_dict())
    x = torch.rand(2, *net.input_shape).round()
    torch.manual_seed(3)
    wanted = net.eval()(x)
    torch.manual_seed(3)
    assert torch.equal(again.eval()(x), wanted)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), again):
        assert recipes.recipe(twin) == recipes.recipe(net)


class Wide(ConvNet):
    def __init__(self, width, *args, **kwargs):
        super().__init__(*args, channels=(width,), **kwargs)


class Plain(ConvNet):
    pass


class Wrapped(ConvNet):
    def __init__(self, extra, **kwargs):
        super().__init__(**kwargs)
        self.extra = extra


def test_arguments_are_named_through_subclasses():
    assert recipes.recipe(Wide(3, 5, hidden=7))["init_args"] == {"width": 3, "num_classes": 5, "hidden": 7}
    again = recipes.build(recipes.recipe(Wide(3, 5, hidden=7)))
    assert (again.num_classes, again.head.in_features, again.features[0].out_channels) == (5, 7, 3)
    stored = recipes.recipe(Plain(4, time_steps=3))
    assert stored["init_args"].items() >= {"num_classes": 4, "hidden": 128, "time_steps": 3}.items()  # defaults too
    assert list(recipes.accepted(Wide))[:2] == ["width", "num_classes"]


def test_neurons_and_values():
    for neuron in (
        LIF(torch.tensor([0.1, 0.2]), channels=2),
        RecurrentLIF(3, beta=0.9, bias=True),
        LIF(backend="reference"),
    ):
        again = recipes.build(recipes.describe(neuron))
        assert str(again) == str(neuron)
        assert torch.equal(again.beta, neuron.beta)
    plain = recipes.describe(
        {"a": (1, [2.5, None]), "b": Path("x/y"), "c": np.int64(3), "d": np.float64(0.5), "e": True}
    )
    assert plain == {"a": (1, [2.5, None]), "b": "x/y", "c": 3, "d": 0.5, "e": True}
    assert [type(plain[key]) for key in "bcde"] == [str, int, float, bool]
    tensor = torch.ones(2)
    stored = recipes.describe(tensor)
    tensor.zero_()
    assert torch.equal(stored, torch.ones(2))


def test_a_record_is_that_of_construction():
    channels = [4]
    net = ConvNet(channels=channels)
    channels.append(8)
    assert recipes.recipe(net)["init_args"]["channels"] == [4]


def test_makers_of_optimisers():
    made = recipes.describe(functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    assert made == {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}
    again = recipes.build(made)([nn.Parameter(torch.ones(1))])
    assert isinstance(again, torch.optim.SGD)
    assert again.defaults["momentum"] == 0.9
    cosine = recipes.build(recipes.describe(functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=7)))
    assert cosine(again).T_max == 7
    assert recipes.describe(torch.optim.Adam)["class_path"] == "torch.optim.Adam"


def test_what_has_no_recipe_says_why():
    class Local(ConvNet):
        pass

    @dataclass(frozen=True)
    class LocalAttack(PGD):
        pass

    def factory(kind, **settings):
        return kind

    for value, reason in [
        (nn.Linear(2, 2), "a Linear is nothing that a checkpoint can store"),
        (lambda p: p, "<lambda> is nothing that"),
        (functools.partial(factory, torch.optim.SGD, lr=1), "a partial is nothing that"),
        (functools.partial(torch.optim.SGD, lr=print), "print is nothing that"),
        (Local(), "Local is defined inside a function"),
        (LocalAttack(Linf(0.1)), "LocalAttack is defined inside a function"),
        (Wrapped(nn.ReLU()), "extra of Wrapped: a ReLU is nothing that"),
        (Wrapped([{"a": nn.ReLU()}]), "extra of Wrapped: a ReLU"),
        (from_snntorch(nn.Sequential(nn.Linear(2, 2), snn.Leaky(0.9)), time_steps=2), "net of SnnTorchNetwork: a Seq"),
    ]:
        with pytest.raises(recipes.NotStorable, match=reason):
            recipes.describe(value)


def test_a_program_can_register_classes_of_its_own():
    assert recipes.build(recipes.describe(Wrapped(Schedule(3)))).extra == Schedule(3)
    with pytest.raises(recipes.NotStorable, match="Forgetful does not keep its argument size"):
        recipes.describe(Forgetful(3))


@recipes.Storable.register
@dataclass(frozen=True)
class Schedule:
    steps: int


@recipes.Storable.register
class Forgetful:
    def __init__(self, size):
        pass


@pytest.mark.parametrize(
    "path",
    ["os.system", "builtins.eval", "subprocess.Popen", "torch.nn.Linear", "torch.load", "pathlib.Path", "builtins.type",
     "sg_lightning.recipes.build", "sg_lightning.backbones.ConvNet.__init__", "torch.utils.data.DataLoader"],
)  # fmt: skip
def test_recipes_build_nothing_else(path):
    import os
    import subprocess  # noqa: F401 - imported, and refused all the same

    assert os
    for bad in ({"class_path": path}, [{"class_path": path, "init_args": {}}], {"a": {"class_path": path}}):
        with pytest.raises(ValueError, match="is no class that a checkpoint may build"):
            recipes.build(bad)


def test_nothing_is_imported_for_a_recipe(tmp_path, monkeypatch):
    (tmp_path / "hostile_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Net: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    for path in ("hostile_module.Net", "hostile_module", "", None, 3, "sg_lightning.backbones.Nonsense", "..", "a..b"):
        with pytest.raises(ValueError, match="is not imported, and nothing is imported on behalf of a checkpoint"):
            recipes.find_class(path)
    assert not (tmp_path / "ran").exists()
