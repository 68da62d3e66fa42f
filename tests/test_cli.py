"""The command line: configs that compose, runs that save themselves, evaluation from a checkpoint, clear mistakes."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from sg_lightning import SpikingClassifier
from sg_lightning.callbacks import RobustnessEvaluation, SparseGradient
from sg_lightning.cli import main, run
from sg_lightning.evaluation import RobustnessResult
from sg_lightning.modules import AdversarialClassifier

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = ["--model.backbone.time_steps=2", "--model.backbone.channels=[4,4]", "--model.backbone.hidden=8"]
SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1",
         "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]  # fmt: skip
METHODS = sorted(path.stem for path in CONFIGS.glob("method/*.yaml"))


def writers():
    spec = importlib.util.spec_from_file_location("written", Path(__file__).parent / "datamodules/test_images.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compose(data="digits", model="convnet", method="vanilla", trainer="cpu"):
    parts = {"data": data, "model": model, "method": method, "trainer": trainer}
    return [word for kind, name in parts.items() for word in ("-c", str(CONFIGS / kind / f"{name}.yaml"))]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sg-lightning"])


@pytest.fixture
def trained(capsys):
    main(["fit", *compose(method="at_sr"), *TINY, *SHORT, "--data.batch_size=16",
          "--model.attack.threat.eps=2/16", "--model.attack.steps=2"])  # fmt: skip
    assert "sg-lightning evaluate -c" in capsys.readouterr().out
    return Path("lightning_logs/version_0")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_one_step(method):
    cli = run(["fit", *compose(method=method, trainer="smoke"), *TINY, "--data.batch_size=2"])
    assert isinstance(cli.model, AdversarialClassifier) == method.startswith("at")
    kinds = [type(callback) for callback in cli.trainer.callbacks]
    assert (SparseGradient in kinds) == method.endswith("sr")
    assert RobustnessEvaluation in kinds


@pytest.mark.parametrize("data", ["cifar10", "cifar100", "mnist", "fashion_mnist"])
@pytest.mark.parametrize(("model", "size"), [("convnet", TINY), ("vgg11", ["--model.backbone.head=[8]", TINY[0]]),
                                             ("wrn16_4", ["--model.backbone.widen=1", TINY[0]])])  # fmt: skip
def test_every_data_set_and_network_runs_one_step(data, model, size):
    small = "mnist" in data
    make = writers()
    if small:
        make.write_idx(Path("data"))
    else:
        make.write_cifar(Path("data"), 100 if data == "cifar100" else 10)
    words = ["fit", *compose(data, model, "sr", "smoke"), *size, "--data.batch_size=2", "--data.download=false"]
    if small and model != "convnet":
        with pytest.raises(SystemExit, match="pad the images"):
            main(words)
        return
    cli = run(words)
    backbone = cli.model.backbone
    x = cli.datamodule.test_set[0][0].unsqueeze(0)
    assert backbone.eval()(x).shape == (1, cli.datamodule.num_classes)


@pytest.mark.parametrize("trainer", ["cpu", "gpu", "ddp", "smoke"])
def test_trainer_fragments_never_set_callbacks(trainer):
    content = yaml.safe_load((CONFIGS / f"trainer/{trainer}.yaml").read_text())
    assert "callbacks" not in content["trainer"]
    assert set(content) == {"seed_everything", "trainer"}


def test_a_run_saves_its_whole_config_and_checkpoints_load_without_arguments(trained):
    config = (trained / "config.yaml").read_text()
    assert "eps: 2/16" in config
    assert "SparseGradient" in config
    assert {p.name for p in (trained / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    module = SpikingClassifier.load_from_checkpoint(trained / "checkpoints/best.ckpt")
    assert isinstance(module, AdversarialClassifier)
    assert module.backbone.time_steps == 2
    assert module(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def evaluate_words(trained, *more):
    return ["evaluate", "-c", str(trained / "config.yaml"), "--ckpt_path", str(trained / "checkpoints/best.ckpt"),
            "--suite", "quick", "--max_samples", "33", "--check_samples_count", "0", *more]  # fmt: skip


def test_evaluate_on_one_and_two_processes_and_report(trained, capsys):
    main(evaluate_words(trained))
    shown = capsys.readouterr().out
    assert "linf 2/16" in shown
    assert "union" in shown
    one = RobustnessResult.load(trained / "robustness/best-quick")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    words = evaluate_words(trained, "--out", "two", "--trainer.devices=2", "--trainer.strategy=ddp")
    done = subprocess.run(
        [sys.executable, "-m", "sg_lightning.cli", *words], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("union") == 1  # rank 0 only
    two = RobustnessResult.load("two")
    assert len(one.ids) == len(two.ids) == 33
    assert len(one.rows) == len(two.rows)
    decisions = [{(r.id, r.norm, r.eps, r.attack): (r.clean, r.status) for r in found.rows} for found in (one, two)]
    assert decisions[0].keys() == decisions[1].keys()
    different = sum(decisions[0][key] != decisions[1][key] for key in decisions[0])
    assert different <= 0.01 * len(decisions[0])  # float32 kernels round by batch shape
    assert not list(Path("two").glob("rows.*.csv"))
    main(["report", f"one={trained / 'robustness/best-quick'}", "two", "--out", "page"])
    assert Path("page/report.html").is_file()


def test_configs_are_copied_and_never_over_others(capsys):
    main(["configs"])
    assert "method/sr.yaml" in capsys.readouterr().out
    main(["configs", "--to", "mine"])
    assert (Path("mine/data/digits.yaml")).read_text() == (CONFIGS / "data/digits.yaml").read_text()
    with pytest.raises(SystemExit, match="already"):
        main(["configs", "--to", "mine"])


def test_mistakes_are_one_sentence(trained, capsys):
    broken = Path("broken.ckpt")
    broken.write_bytes((trained / "checkpoints/best.ckpt").read_bytes()[:2000])
    config = ["-c", str(trained / "config.yaml")]
    for words, message in [
        (["evaluate", *config], "evaluate needs the weights"),
        (["evaluate", *config, "--ckpt_path", str(broken)], "broken.ckpt"),
        (["evaluate", *config, "--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt"),
        (evaluate_words(trained, "--suite", "standart"), "unknown suite 'standart'"),
        (["report", "nothing"], "nothing holds no saved result"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert message in str(stop.value)
        assert len(str(stop.value).splitlines()) <= 2
    with pytest.raises(SystemExit):
        main(["fit", *compose(), "--model.backbone.chanels=[4]"])
    assert "chanels" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["fit", *compose(method="at"), "--model.attack.threat.eps=8/x"])


def test_help_names_no_torch_module(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    assert "torch.nn." not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("fit", "evaluate", "report", "configs"))
