"""Checkpoints say how to build what they hold, wherever it was built, and cannot do anything else."""

import functools
import inspect
from dataclasses import dataclass

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sg_lightning.attacks import FGSM, PGD
from sg_lightning.backbones import VGG, Backbone, ConvNet, SpikingMLP, WideResNet
from sg_lightning.callbacks import RobustnessEvaluation, SparseGradient
from sg_lightning.domains import Box
from sg_lightning.encoding import Direct
from sg_lightning.modules import AdversarialClassifier, SpikingClassifier
from sg_lightning.modules.adversarial import AdversarialTraining
from sg_lightning.neurons import LIF, LeakyIntegrator, surrogates
from sg_lightning.threats import L2, Budget, Linf

TINY = {"channels": (3,), "hidden": 4}
ATTACK = PGD(Linf("8/255", domain=Box()), steps=2, step_size="2/255")


class Own(Backbone):
    """What a user writes."""

    def __init__(self, sizes, neuron=None, *, name="own"):
        super().__init__(num_classes=sizes[-1], input_shape=(1, 8, 8), time_steps=2, spiking=True, domain=Box())
        self.neuron = LIF() if neuron is None else neuron.clone()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip((64, *sizes), sizes, strict=False))

    def logits(self, x):
        z = x.flatten(1)
        for layer in self.layers:
            z = self.neuron(layer(z).expand(2, -1, -1)).mean(0)
        return z


NETWORKS = {
    "convnet": lambda: ConvNet(7, **TINY, encoding=Direct(3), neuron=LIF(0.8, 0.5, surrogate=surrogates.Atan(3.0))),
    "vgg": lambda: VGG("vgg5", 3, 1, 8, head=[4], time_steps=1, mean=(0.5,), std=(0.25,)),
    "wide": lambda: WideResNet(10, 1, 4, 1, 8, pool=2, time_steps=1),
    "twin": lambda: ConvNet(2, **TINY, spiking=False),
    "mlp": lambda: SpikingMLP(6, (4,), 20, time_steps=5, recurrent=True, readout=LeakyIntegrator(0.9)),
    "own": lambda: Own((5, 3), LIF(0.7), name="x"),
}


def still(params):
    return torch.optim.SGD(params, lr=0.0)


def trainer(**options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return pl.Trainer(**{"max_epochs": 1, "accelerator": "cpu", "logger": False, **quiet, **options})


def loader(net, samples=6):
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(samples, *net.input_shape, generator=generator).round()
    return DataLoader(TensorDataset(x, torch.arange(samples) % net.num_classes), batch_size=3)


def saved(module, path, **options):
    run = trainer(enable_checkpointing=False, **options)
    run.fit(module, loader(module.backbone))
    run.save_checkpoint(path)
    return module.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_module_built_in_python_loads_from_the_path_alone(tmp_path, name):
    path = tmp_path / "a.ckpt"
    module = saved(SpikingClassifier(NETWORKS[name](), torch.optim.Adam, label_smoothing=0.2), path)
    torch.load(path, weights_only=True)
    loaded = SpikingClassifier.load_from_checkpoint(path).eval()
    x = next(iter(loader(module.backbone)))[0]
    assert torch.equal(loaded(x), module(x))
    assert loaded.backbone.num_classes == module.backbone.num_classes
    assert str(loaded.backbone) == str(module.backbone)
    assert loaded.label_smoothing == 0.2
    assert isinstance(loaded.configure_optimizers(), torch.optim.Adam)
    with path.open("rb") as file:
        again = SpikingClassifier.load_from_checkpoint(file, map_location="cpu")
    assert torch.equal(again.eval()(x), module(x))
    # The second generation is as good as the first.
    saved(loaded, tmp_path / "b.ckpt")
    assert str(SpikingClassifier.load_from_checkpoint(tmp_path / "b.ckpt").backbone) == str(module.backbone)


@pytest.mark.parametrize("attack", [ATTACK, FGSM(L2("0.5"))])
def test_adversarial_training_comes_back(tmp_path, attack):
    path = tmp_path / "a.ckpt"
    module = saved(AdversarialClassifier(ConvNet(**TINY), attack=attack, crafting_mode="train"), path)
    for cls in (SpikingClassifier, AdversarialClassifier):
        loaded = cls.load_from_checkpoint(path)
        assert type(loaded) is AdversarialClassifier
        assert loaded.attack == attack
        assert loaded.crafting_mode == "train"
        assert str(loaded.backbone) == str(module.backbone)
    other = SpikingClassifier.load_from_checkpoint(path, attack=FGSM(Linf("1/255")), label_smoothing=0.3)
    assert other.attack == FGSM(Linf("1/255"))
    assert other.label_smoothing == 0.3
    assert other.crafting_mode == "train"


class Inverting(SpikingClassifier):
    def __init__(self, *args, share=0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.save_hyperparameters()  # what many do; the live network in it must not reach the checkpoint
        self.share = share


class Both(AdversarialTraining, Inverting):
    pass


@pytest.mark.filterwarnings("ignore:Attribute 'backbone' is an instance")
def test_users_modules_and_mixins_come_back(tmp_path):
    path = tmp_path / "a.ckpt"
    saved(Both(ConvNet(**TINY), torch.optim.SGD, attack=ATTACK, share=0.25), path)
    loaded = SpikingClassifier.load_from_checkpoint(path)
    assert type(loaded) is Both
    assert (loaded.share, loaded.attack) == (0.25, ATTACK)
    assert isinstance(loaded.configure_optimizers(), torch.optim.SGD)
    # Another class that is no kind of it takes what it knows.
    saved(AdversarialClassifier(ConvNet(**TINY), attack=ATTACK), path)
    assert type(Inverting.load_from_checkpoint(path)) is Inverting


def test_foreign_parts_are_passed(tmp_path):
    path = tmp_path / "a.ckpt"
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    net.input_shape, net.num_classes = (1, 4, 4), 4
    saved(SpikingClassifier(net), path)
    with pytest.raises(TypeError) as stop:
        SpikingClassifier.load_from_checkpoint(path)
    assert str(stop.value) == (
        f"{path} does not say how to build backbone (a Sequential is nothing that a checkpoint can store); build it as "
        "it was and pass it: SpikingClassifier.load_from_checkpoint(path, backbone=...)"
    )
    fresh = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    assert SpikingClassifier.load_from_checkpoint(path, backbone=fresh).backbone is fresh
    assert torch.equal(fresh[1].weight, net[1].weight)

    @dataclass(frozen=True)
    class Local(PGD):
        pass

    saved(AdversarialClassifier(ConvNet(**TINY), attack=Local(Linf(0.1), steps=1)), path)
    with pytest.raises(TypeError, match=r"how to build attack \(Local is defined inside a function"):
        SpikingClassifier.load_from_checkpoint(path)
    assert SpikingClassifier.load_from_checkpoint(path, attack=ATTACK).attack == ATTACK


@pytest.mark.parametrize("stored", [True, False])
def test_optimisers(tmp_path, stored, recwarn):
    path = tmp_path / "a.ckpt"
    step = torch.optim.lr_scheduler.StepLR
    made = {
        "optimizer": functools.partial(torch.optim.SGD, lr=0.3),
        "lr_scheduler": functools.partial(step, step_size=1),
    }
    lost = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.3), "lr_scheduler": lambda o: step(o, 1)}
    saved(SpikingClassifier(ConvNet(**TINY), **(made if stored else lost)), path)
    loaded = SpikingClassifier.load_from_checkpoint(path)
    recwarn.clear()
    trainer(enable_checkpointing=False).test(loaded, loader(loaded.backbone), verbose=False)
    about = "could not store its optimizer"
    assert not any(about in str(w.message) for w in recwarn)  # evaluation needs none
    if stored:
        found = loaded.configure_optimizers()
        assert found["optimizer"].defaults["lr"] == 0.3
        assert isinstance(found["lr_scheduler"]["scheduler"], step)
        return
    with pytest.warns(UserWarning, match="could not store its lr_scheduler"), pytest.warns(UserWarning, match=about):
        assert isinstance(loaded.configure_optimizers(), torch.optim.AdamW)
    passed = SpikingClassifier.load_from_checkpoint(path, optimizer=still, lr_scheduler=None)
    recwarn.clear()
    assert isinstance(passed.configure_optimizers(), torch.optim.SGD)
    assert not len(recwarn)
    # Resuming uses the module's own.
    again = SpikingClassifier(ConvNet(**TINY), **lost)
    run = trainer(max_epochs=2, enable_checkpointing=False)
    run.fit(again, loader(again.backbone), ckpt_path=path)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.003)


def test_the_trainer_loads_weights_only(tmp_path):
    path = tmp_path / "a.ckpt"
    module = saved(AdversarialClassifier(ConvNet(**TINY), attack=ATTACK), path, callbacks=[SparseGradient(0.1)])
    fresh = AdversarialClassifier(ConvNet(**TINY), attack=ATTACK)
    run = trainer(enable_checkpointing=False)
    for ckpt in ({"weights_only": True}, {}):
        (result,) = run.test(fresh, loader(fresh.backbone), ckpt_path=path, verbose=False, **ckpt)
        (wanted,) = run.test(module, loader(fresh.backbone), verbose=False)
        assert result == wanted


def test_evaluation_settings_never_come_from_a_checkpoint(tmp_path):
    path = tmp_path / "a.ckpt"
    budgets = {"linf": Budget(("0.123",), "0.123")}
    first = RobustnessEvaluation("quick", budgets=budgets, max_samples=3, seed=11)
    module = AdversarialClassifier(ConvNet(**TINY), attack=ATTACK)
    run = trainer(callbacks=[first], enable_checkpointing=False)
    run.fit(module, loader(module.backbone), loader(module.backbone))
    run.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    assert "0.123" not in str(content["hyper_parameters"]) + str(content["callbacks"]) + str(content["recipe"])
    assert not any("Robust" in key for key in content["callbacks"])
    second = RobustnessEvaluation("quick", budgets={"l2": Budget(("0.5",), "0.5")}, max_samples=2)
    trainer(callbacks=[second], enable_checkpointing=False).test(
        SpikingClassifier.load_from_checkpoint(path), loader(module.backbone), ckpt_path=path, verbose=False
    )
    assert {row.norm for row in second.result.rows} == {"", "l2"}
    assert len(second.result.ids) == 2


def test_loggers_get_the_settings_of_every_part():
    module = AdversarialClassifier(ConvNet(**TINY), attack=ATTACK)
    assert module.hparams["backbone"]["init_args"]["channels"] == (3,)
    assert module.hparams["attack"]["init_args"]["threat"]["init_args"]["eps"] == "8/255"


def test_weights_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "a.ckpt"
    saved(SpikingClassifier(ConvNet(**TINY)), path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        SpikingClassifier.load_from_checkpoint(path, backbone=ConvNet(channels=(5,), hidden=4))


def test_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "a.ckpt"
    saved(SpikingClassifier(ConvNet(**TINY)), path)
    whole = path.read_bytes()
    for size in (0, 1, 1000, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a\.ckpt is no checkpoint, or only a part of one"):
            SpikingClassifier.load_from_checkpoint(path)
    path.write_text("not a checkpoint")
    with pytest.raises(ValueError, match="is no checkpoint, or only a part of one"):
        SpikingClassifier.load_from_checkpoint(path)
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="is no checkpoint of a LightningModule: it has no state_dict"):
        SpikingClassifier.load_from_checkpoint(path)
    torch.save({"state_dict": {}, "hyper_parameters": {"backbone": ConvNet(**TINY)}}, path)
    with pytest.raises(ValueError, match=r"holds more than tensors and plain values.*weights_only=False"):
        SpikingClassifier.load_from_checkpoint(path)
    with pytest.raises(FileNotFoundError, match=r"cannot read the checkpoint .*nowhere\.ckpt: No such file"):
        SpikingClassifier.load_from_checkpoint(tmp_path / "nowhere.ckpt")


def forge(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize("where", ["class", "backbone", "inside", "optimizer"])
@pytest.mark.parametrize("target", ["os.system", "not_there.Net", "torch.hub.load"])
def test_a_checkpoint_cannot_name_other_code(tmp_path, where, target):
    path = tmp_path / "a.ckpt"
    saved(SpikingClassifier(ConvNet(**TINY), torch.optim.SGD), path)
    evil = {"class_path": target, "init_args": {"command": "touch ran"}}

    def change(content):
        if where == "class":
            content["recipe"]["class_path"] = target
        elif where == "inside":
            content["hyper_parameters"]["backbone"]["init_args"]["neuron"] = evil
        else:
            content["hyper_parameters"][where] = evil

    forge(path, change)
    with pytest.raises(ValueError, match=rf"{target} is (no class|not imported)"):
        SpikingClassifier.load_from_checkpoint(path)


def test_lightnings_own_instantiator_is_not_used(tmp_path):
    path = tmp_path / "a.ckpt"
    saved(SpikingClassifier(ConvNet(**TINY)), path)
    forge(path, lambda content: content["hyper_parameters"].update(_instantiator="os.system", _class_path="os.system"))
    assert type(SpikingClassifier.load_from_checkpoint(path)) is SpikingClassifier


def test_a_class_that_is_not_imported(tmp_path):
    path = tmp_path / "a.ckpt"
    saved(SpikingClassifier(Own((3,))), path)
    home = inspect.getmodule(Own).__name__
    forge(path, lambda c: c["hyper_parameters"]["backbone"].update(class_path=f"{home}.Gone"))
    with pytest.raises(
        ValueError, match=r"cannot build the backbone of .*Gone is not imported.*import it first; or pass"
    ):
        SpikingClassifier.load_from_checkpoint(path)
    assert SpikingClassifier.load_from_checkpoint(path, backbone=Own((3,))).backbone.num_classes == 3
