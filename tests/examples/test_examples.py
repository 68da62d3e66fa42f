"""The examples run as they stand, say what they promise, and stay short."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from sg_lightning import cli
from sg_lightning.evaluation import RobustnessResult

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
CALLBACKS, SNNTORCH, ANY_MODEL, MODALITIES = sorted(EXAMPLES.glob("0*.py"))
TABLE = r"clean +\d.*\nlinf 2/16 +\d.*\nl2 0\.5 +\d.*\nl1 1\.5 +\d.*\nl0 2 +\d.*\nunion +\d"


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(path, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("path", [CALLBACKS, SNNTORCH, ANY_MODEL, MODALITIES], ids=lambda path: path.stem)
def test_examples_are_short_and_start_with_what_you_will_see(path):
    text = path.read_text()
    assert len(text.splitlines()) < 60
    assert "You will see:" in text.split('"""')[1]


@pytest.mark.filterwarnings("ignore")
def test_callbacks_in_your_project(monkeypatch, capsys):
    run(CALLBACKS, monkeypatch, "--epochs=3")
    shown = capsys.readouterr().out
    tables = re.findall(r"weight ([\d.]+).*\n.*\n" + TABLE, shown)
    assert tables == ["0.0", "0.02"]
    figures = re.findall(r"linf 2/16 +([\d.]+)%", shown)
    assert len(set(figures)) == 2  # the penalty has changed something


@pytest.mark.filterwarnings("ignore")
def test_your_snntorch_net(monkeypatch, capsys):
    run(SNNTORCH, monkeypatch, "--epochs=3", "--samples=16")
    shown = capsys.readouterr().out
    assert re.search(TABLE, shown)
    before, after = map(int, re.search(r"accuracy (\d+)%, after PGD\(Linf\('1/16'\)\) (\d+)%", shown).groups())
    assert before > 30  # chance: 10
    assert after < before


def test_evaluate_any_model(monkeypatch, capsys):
    run(ANY_MODEL, monkeypatch, "--epochs=4", "--samples=24")
    assert re.search(TABLE, capsys.readouterr().out)
    result = RobustnessResult.load("runs/any_model/attacks")
    for norm in result.norms:
        found = torch.load(f"runs/any_model/attacks/adversarial/{norm}.pt")
        assert found["x_adv"].shape == (24, 1, 8, 8)
        assert torch.equal(found["success"], torch.from_numpy(result.broken(norm)))
    run(ANY_MODEL, monkeypatch, "--epochs=4", "--samples=24")  # goes on: nothing is left to do
    assert RobustnessResult.load("runs/any_model/attacks").meta["resumed_samples"] == 24


@pytest.mark.filterwarnings("ignore")
def test_modalities(monkeypatch, capsys):
    run(MODALITIES, monkeypatch, "--epochs=3", "--samples=12")
    shown = capsys.readouterr().out
    assert re.search(
        r"clean +\d.*\nimage_linf 2/16.*\nevents_flips 5%.*\naudio_flips 5%.*\njoint 1 .*\nunion +\d", shown
    )
    accuracies = re.findall(r"(.*): accuracy (\d+)%, with 5% of the sound's spikes flipped (\d+)%", shown)
    (alone, *sound), (together, *all_) = accuracies
    assert (alone, together) == ("sound alone", "image, events and sound")
    assert int(sound[1]) < int(sound[0])  # the attack works
    assert int(all_[1]) > int(sound[1]) + 20  # and the others keep the decision
    page = Path("runs/modalities/report.html").read_text()
    assert "MultimodalDigits (stand-in: a simulated event camera, synthetic speech)" in page


def trial(parameters):
    """Return the command that W&B's agent makes of the sweep for one choice of the parameters."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((EXAMPLES / "05_wandb_sweep.yaml").read_text())
    assert set(parameters) == set(sweep["parameters"])
    assert all(value in sweep["parameters"][name]["values"] for name, value in parameters.items())
    given = create_sweep_command_args({"args": {name: {"value": value} for name, value in parameters.items()}})
    given["program"] = [sweep["program"]]
    words = [given[w[2:-1]] if w.startswith("${") else [w] for w in create_sweep_command(sweep["command"])]
    return [word for part in words for word in part]


def test_a_trial_of_the_sweep(monkeypatch, tmp_path):
    import wandb

    command = trial({"trainer.callbacks.weight": 0.02, "seed_everything": 1})
    assert command[:2] == ["sg-lightning", "fit"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr(sys, "argv", ["sg-lightning"])
    small = ["--trainer.max_epochs=5", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1",
             "--trainer.enable_progress_bar=false", "--data.batch_size=8", "--model.backbone.channels=[4,4]"]  # fmt: skip
    done = cli.run([*command[1:], *small])
    wandb.finish()
    (penalty,) = [c for c in done.trainer.callbacks if type(c).__name__ == "SparseGradient"]
    assert penalty.weight == 0.02
    assert done.config.fit.seed_everything == 1
    assert "robust/union/acc" in done.trainer.callback_metrics
    (folder,) = Path("wandb").glob("offline-run-*")
    (table,) = folder.glob("files/media/table/robust/*.json")
    assert json.loads(table.read_text())["data"][1][:3] == ["linf", "2/16", "pgd"]


def commands(path):
    """Return the fenced bash blocks of a page, joined lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL)
    return [block.replace("\\\n", " ") for block in blocks]


PAGES = [EXAMPLES / "04_ddp.md", ROOT / "docs/multi_gpu.md", ROOT / "docs/modalities.md", ROOT / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_the_pages_are_accepted(page, monkeypatch, tmp_path, capsys):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr(sys, "argv", ["sg-lightning"])
    seen = []
    for block in commands(page):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
        for line in block.splitlines():
            found = re.search(r"(?:sg-lightning|sg_lightning\.cli) (fit|evaluate) (.*)", line)
            if found is None:
                continue
            command, words = found[1], shlex.split(found[2])
            if command == "evaluate":  # the config that the fit before it would have saved
                words[words.index("-c") + 1] = "saved.yaml"
            with pytest.raises(SystemExit) as stop:
                cli.main([command, *words, "--print_config"])
            assert stop.value.code == 0
            if command == "fit":
                Path("saved.yaml").write_text(capsys.readouterr().out)
            seen.append(command)
    assert {"fit", "evaluate"} <= set(seen)


def test_the_recipe_for_several_processes_runs(tmp_path):
    (block,) = commands(EXAMPLES / "04_ddp.md")
    short = " --trainer.limit_train_batches=2 --trainer.limit_val_batches=1 --model.backbone.channels=[4,4]"
    script = block.replace("--trainer.max_epochs=2", "--trainer.max_epochs=1" + short).replace("=128", "=9")
    script = script.replace("sg-lightning", f"{sys.executable} -m sg_lightning.cli")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-e"], input=script, text=True, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = RobustnessResult.load("lightning_logs/version_0/robustness/best-quick")
    assert result.ids.tolist() == list(range(9))
    assert done.stdout.count("union") == 1
