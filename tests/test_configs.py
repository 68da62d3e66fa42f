"""Every shipped config is complete, says what it is for, and runs."""

import importlib.util
import re
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch.utils.data import DataLoader, TensorDataset

from sg_lightning.callbacks import RobustnessEvaluation, SparseGradient
from sg_lightning.cli import main, run
from sg_lightning.domains import Counts
from sg_lightning.modules import AdversarialClassifier
from sg_lightning.neurons import LIF
from sg_lightning.neurons.surrogates import Triangular

CONFIGS = Path(__file__).parents[1] / "configs"
EXPERIMENTS = sorted(path.stem for path in CONFIGS.glob("experiments/*.yaml"))
STEPS = "--model.backbone.time_steps=2"
SHRINK = {
    "ConvNet": [STEPS, "--model.backbone.channels=[4,4]", "--model.backbone.hidden=8"],
    "VGG": [STEPS, "--model.backbone.head=[8]"],
    "WideResNet": [STEPS, "--model.backbone.widen=1"],
    "SpikingMLP": ["--data.time_steps=2", "--model.backbone.hidden=[8]"],
    "FusionNet": ["--model.backbone.hidden=8"],
}
CPU = ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false",
       "--trainer.enable_model_summary=false"]  # fmt: skip


class Rasters(pl.LightningDataModule):
    """Spike rasters, to see a network that is not for images."""

    num_classes = 5

    def train_dataloader(self):
        x = (torch.rand(4, 4, 6) < 0.3).float()
        return DataLoader(TensorDataset(x, torch.arange(4)), batch_size=2)

    val_dataloader = train_dataloader


def writers(name="test_images"):
    spec = importlib.util.spec_from_file_location("written", Path(__file__).parent / f"datamodules/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sg-lightning"])


def content(*parts):
    return yaml.safe_load(CONFIGS.joinpath(*parts).with_suffix(".yaml").read_text())


def tiny_data(config):
    """Write a few samples in the original files, and return the options that use them."""
    kind = config["data"]["class_path"].rsplit(".", 1)[-1]
    if kind in ("Digits", "MultimodalDigits", "SpokenDigits"):
        return []
    make = writers({"SHD": "test_shd", "CIFAR10DVS": "test_event_cameras"}.get(kind, "test_images"))
    if kind == "SHD":
        Path("data").mkdir()
        make.write_set(Path("data"))
    elif kind == "CIFAR10DVS":
        make.write.put(Path("data"), make.files(make.CIFAR10DVS))
    elif "MNIST" in kind:
        make.write_idx(Path("data"))
    else:
        make.write_cifar(Path("data"), 100 if kind == "CIFAR100" else 10)
    return ["--data.download=false"]


def test_every_file_says_what_it_is_for():
    paths = sorted(CONFIGS.rglob("*.yaml"))
    assert {path.parent.name for path in paths} == {"data", "model", "method", "trainer", "experiments"}
    for path in paths:
        head = re.match(r"(# .+\n)+", path.read_text())
        assert head, path
        assert max(map(len, path.read_text().splitlines())) <= 130, path
        if path.parent.name == "experiments":
            assert f"#   sg-lightning fit -c configs/experiments/{path.name}\n" in head[0]
            measured = "Measured on .* seconds .*Accuracy on .* test digits: .* under suite (basic|quick) "
            unmeasured = "Accuracy and running time are not measured yet"
            wanted = measured if "digits" in path.stem else unmeasured  # those of big sets
            assert re.search(wanted, " ".join(head[0].split("\n# "))), path


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_one_step(name):
    config = content("experiments", name)
    size = SHRINK[config["model"]["init_args"]["backbone"]["class_path"].rsplit(".", 1)[-1]]
    cli = run(["fit", "-c", str(CONFIGS / f"experiments/{name}.yaml"), *tiny_data(config), *size, *CPU,
               "--data.batch_size=2", "--trainer.fast_dev_run=true"])  # fmt: skip
    assert isinstance(cli.model, AdversarialClassifier) == ("_at" in name)
    kinds = [type(callback) for callback in cli.trainer.callbacks]
    assert (SparseGradient in kinds) == name.endswith("sr")
    assert RobustnessEvaluation in kinds
    assert cli.trainer.global_step == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_one_step_at_full_size(name):
    config = content("experiments", name)
    main(["fit", "-c", str(CONFIGS / f"experiments/{name}.yaml"), *tiny_data(config), *CPU, "--data.batch_size=2",
          "--trainer.fast_dev_run=true"])  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("vanilla", 0.93), ("sr", 0.9), ("at", 0.85), ("at_sr", 0.85)])
def test_digits_are_learned(name, least):
    cli = run(["fit", "-c", str(CONFIGS / f"experiments/digits_convnet_{name}.yaml"), *CPU])
    assert cli.trainer.callback_metrics["val/acc"] > least


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_schedules_end_with_the_training(name):
    config = content("experiments", name)
    schedule = config["model"]["init_args"]["lr_scheduler"]
    assert schedule["class_path"].endswith("CosineAnnealingLR")
    assert schedule["init_args"]["T_max"] == config["trainer"]["max_epochs"]


@pytest.mark.parametrize("model", ["vgg11", "wrn16_4", "vgg_dvs", "sew_resnet18", "sew_resnet19"])
@pytest.mark.parametrize("trainer", ["gpu", "ddp"])
def test_schedules_of_the_big_networks_fit_the_big_trainers(model, trainer):
    schedule = content("model", model)["model"]["init_args"]["lr_scheduler"]
    assert schedule["init_args"]["T_max"] == content("trainer", trainer)["trainer"]["max_epochs"]


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.startswith("cifar10_vgg11") or "wrn" in name])
def test_cifar_experiments_have_the_settings_of_the_paper(name):
    config = content("experiments", name)
    tiny_data(config)
    cli = run(["fit", "-c", str(CONFIGS / f"experiments/{name}.yaml"), *CPU, "--data.download=false",
               "--trainer.fast_dev_run=true", "--data.batch_size=2", "--trainer.limit_train_batches=0",
               "--trainer.limit_val_batches=0",
               *SHRINK["VGG" if "vgg" in name else "WideResNet"][1:]])  # fmt: skip
    net = cli.model.backbone
    assert (net.time_steps, net.encoding.constant, net.spiking) == (8, True, True)
    neurons = [module for module in net.modules() if isinstance(module, LIF)]
    assert len(neurons) == (9 if "vgg" in name else 13)  # eight convolutions and the shrunk head; 1 + 6 * 2 of WRN-16
    for neuron in neurons:
        dynamics = neuron.dynamics
        assert (neuron.beta, neuron.threshold, neuron.surrogate) == (1.0, 1.0, Triangular(1.0))
        assert (dynamics.reset, dynamics.detach_reset, dynamics.fire_at_threshold) == ("zero", False, True)
    made = cli.model.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    assert type(optimizer) is torch.optim.SGD
    assert {k: optimizer.defaults[k] for k in ("lr", "momentum", "weight_decay", "nesterov")} == {
        "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0005, "nesterov": False,
    }  # fmt: skip
    assert (schedule.T_max, schedule.eta_min) == (200, 0.0)
    assert (cli.datamodule.augment, cli.datamodule.shift, cli.datamodule.mirror) == (True, 4, True)
    assert config["data"]["init_args"]["batch_size"] == 32
    assert (config["seed_everything"], config["trainer"]["max_epochs"]) == (42, 200)
    penalties = [c for c in cli.trainer.callbacks if isinstance(c, SparseGradient)]
    for penalty in penalties:
        assert penalty.penalty == SparseGradient(1.0).penalty  # the official code's


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("vanilla", 0.9), ("sr", 0.85)])
def test_spoken_digits_are_learned(name, least):
    cli = run(["fit", "-c", str(CONFIGS / f"experiments/spoken_digits_spiking_mlp_{name}.yaml"), *CPU])
    assert cli.trainer.callback_metrics["val/acc"] > least


def test_sizes_of_rasters_come_from_the_data_and_are_printed_and_saved_where_they_do_not(capsys):
    words = ["-c", str(CONFIGS / "model/spiking_mlp.yaml"), "--model.backbone.hidden=[8]", *CPU]
    data = [
        "--data=SpokenDigits",
        "--data.time_steps=12",
        "--data.group=7",
        "--data.values=counts",
        "--data.batch_size=2",
    ]
    once = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    net = run(["fit", *words, *data, *once]).model.backbone
    assert (net.num_classes, net.input_shape, net.domain) == (10, (12, 20), Counts())
    saved = yaml.safe_load(Path("lightning_logs/version_0/config.yaml").read_text())["model"]["init_args"]["backbone"]
    found = {name: saved["init_args"][name] for name in ("in_features", "time_steps", "values", "num_classes")}
    assert found == {"in_features": 20, "time_steps": 12, "values": "counts", "num_classes": 10}
    capsys.readouterr()
    images = [
        "-c",
        str(CONFIGS / "data/digits.yaml"),
        "-c",
        str(CONFIGS / "model/convnet.yaml"),
        "--model.backbone.time_steps=3",
    ]
    for given, wanted in ((data, {}), (images, {"time_steps": 3})):
        with pytest.raises(SystemExit):
            run(["fit", *(given if given is images else [*words, *given]), "--print_config"])
        printed = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["backbone"]["init_args"]
        assert {name: printed[name] for name in ("in_features", "time_steps", "values") if name in printed} == wanted


def test_rasters_run_through_a_recurrent_network():
    cli = run(["fit", "--data=Rasters", "-c", str(CONFIGS / "model/spiking_mlp.yaml"), "--model.backbone.hidden=[8]",
               "--model.backbone.in_features=6", "--model.backbone.time_steps=4", *CPU, "--trainer.fast_dev_run=true", "--trainer.num_sanity_val_steps=0"])  # fmt: skip
    net = cli.model.backbone
    assert (net.num_classes, net.input_shape) == (5, (4, 6))
    assert net.features[1].recurrent is not None
    assert cli.trainer.global_step == 1


def test_encoders_of_a_fusion_get_their_sizes_from_the_data(tmp_path):
    cli = run(["fit", "-c", str(CONFIGS / "data/multimodal_digits.yaml"), "-c", str(CONFIGS / "model/fusion.yaml"), *CPU,
               "--data.batch_size=4", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1",
               "--trainer.num_sanity_val_steps=0"])  # fmt: skip
    net = cli.model.backbone
    assert net.input_shape == {"image": (1, 8, 8), "events": (6, 2, 16, 16), "audio": (50, 70)}
    (config,) = Path().rglob("config.yaml")
    assert (
        yaml.safe_load(config.read_text())["model"]["init_args"]["backbone"]["init_args"]["sizes"]
        == cli.datamodule.sizes
    )
    suite = tmp_path / "one.yaml"
    suite.write_text("{eps: headline, norms: [flips, joint], attacks: [{attack: pgd, steps: 1}]}")
    (weights,) = Path().rglob("best.ckpt")
    again = run(["evaluate", "-c", str(config), "--ckpt_path", str(weights), f"--suite={suite}", "--max_samples=4"])
    assert again.trainer.result.norms == ["events_flips", "audio_flips", "joint"]
    for a, b in zip(again.model.backbone.parameters(), net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_events_reach_an_image_network_as_frames():
    cli = run(["fit", "-c", str(CONFIGS / "data/saccade_digits.yaml"), "-c", str(CONFIGS / "model/sew_resnet19.yaml"), *CPU,
               "--model.backbone.encoding=sg_lightning.encoding.Frames", "--data.batch_size=2",
               "--trainer.fast_dev_run=true"])  # fmt: skip
    assert cli.model.backbone.input_shape == (6, 2, 16, 16)


def test_events_need_a_network_that_takes_frames():
    words = [
        "-c",
        str(CONFIGS / "data/saccade_digits.yaml"),
        *CPU,
        "--data.batch_size=2",
        "--trainer.fast_dev_run=true",
    ]
    with pytest.raises(SystemExit, match=r"ConvNet was built for images .* --model.backbone.encoding=Frames"):
        main(["fit", *words, "-c", str(CONFIGS / "model/convnet.yaml")])
    counts = ["--model.attack.threat=EventFlips", "--model.attack.threat.eps=5%",
              "--model.attack.threat.domain.high=.inf", "--model.attack.threat.domain.lattice=count"]  # fmt: skip
    words += ["-c", str(CONFIGS / "model/convnet_events.yaml"), "-c", str(CONFIGS / "method/at.yaml")]
    with pytest.raises(SystemExit, match=r"Linf gives values between the whole numbers .* domain=Counts\(\)"):
        main(["fit", *words])
    cli = run(["fit", *words, *counts])
    assert cli.model.backbone.input_shape == (6, 2, 16, 16)
    legal = cli.model.attack.threat.domain
    assert (legal.low, legal.high, legal.lattice) == (0.0, float("inf"), "count")


@pytest.mark.parametrize("method", ["sr", "at_sr"])
def test_the_weight_of_the_penalty_is_one_key(method):
    cli = run(["fit", "-c", str(CONFIGS / "data/digits.yaml"), "-c", str(CONFIGS / "model/convnet.yaml"), *SHRINK["ConvNet"],
               "-c", str(CONFIGS / f"method/{method}.yaml"), *CPU, "--trainer.callbacks.weight=0.5",
               "--trainer.fast_dev_run=true", "--data.batch_size=2"])  # fmt: skip
    (penalty,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, SparseGradient)]
    assert penalty.weight == 0.5
