"""The command line: configs that compose, runs that save themselves, evaluation from a checkpoint, clear mistakes."""

import csv
import errno
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import yaml
from lightning_utilities.core.imports import RequirementCache
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sg_lightning import SpikingClassifier, __version__
from sg_lightning.attacks import PGD
from sg_lightning.backbones import ConvNet
from sg_lightning.callbacks import RobustnessEvaluation, SparseGradient
from sg_lightning.cli import COMMANDS, main, run
from sg_lightning.datamodules import Digits
from sg_lightning.evaluation import RobustnessResult
from sg_lightning.evaluation.rows import RowStore
from sg_lightning.modules import AdversarialClassifier
from sg_lightning.threats import Linf
from sg_lightning.trainer import RobustTrainer

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


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """A short training, once; each test gets a copy of its folder."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as shown:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["sg-lightning"])
        main(["fit", *compose(method="at_sr"), *TINY, *SHORT, "--data.batch_size=16",
              "--model.attack.threat.eps=2/16", "--model.attack.steps=2"])  # fmt: skip
    assert "sg-lightning evaluate -c" in shown.getvalue()
    return folder / "lightning_logs"


@pytest.fixture
def trained(a_run):
    shutil.copytree(a_run, "lightning_logs")
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
    if small and model == "wrn16_4":
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
    sizes = yaml.safe_load(config)["model"]["init_args"]["backbone"]["init_args"]
    used = {"num_classes": 10, "in_channels": 1, "input_size": 8, "mean": [0.3057], "time_steps": 2}
    assert {name: sizes[name] for name in used} == used
    assert "SparseGradient" in config
    assert {p.name for p in (trained / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    module = SpikingClassifier.load_from_checkpoint(trained / "checkpoints/best.ckpt")
    assert isinstance(module, AdversarialClassifier)
    assert module.backbone.time_steps == 2
    assert module(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def evaluate_words(trained, *more):
    return ["evaluate", "-c", str(trained / "config.yaml"), "--ckpt_path", str(trained / "checkpoints/best.ckpt"),
            "--suite", "quick", "--max_samples", "17", "--check_samples_count", "0", *more]  # fmt: skip


def test_evaluate_on_one_and_two_processes_and_report(trained, capsys):
    main(evaluate_words(trained, "--keep", "all"))
    shown = capsys.readouterr().out
    assert "linf 2/16" in shown
    assert "union" in shown
    one = RobustnessResult.load(trained / "robustness/best-quick")
    for norm in one.norms:
        kept = torch.load(trained / f"robustness/best-quick/adversarial/{norm}.pt", weights_only=True)
        assert kept["ids"].tolist() == list(range(17))
        assert kept["success"].sum() == sum(one.broken_by(norm).values())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    words = evaluate_words(trained, "--out", "two", "--trainer.devices=2", "--trainer.strategy=ddp")
    done = subprocess.run(
        [sys.executable, "-m", "sg_lightning.cli", *words], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("union") == 1  # rank 0 only
    assert "DistributedSampler" not in done.stderr
    assert "litlogger" not in done.stderr
    two = RobustnessResult.load("two")
    assert len(one.ids) == len(two.ids) == 17
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
    main(["configs", "--to", "mine"])  # what is there and the same is no mistake
    Path("mine/data/digits.yaml").write_text("data: mine\n")
    with pytest.raises(SystemExit, match="differs"):
        main(["configs", "--to", "mine"])
    assert Path("mine/data/digits.yaml").read_text() == "data: mine\n"


def test_validate_test_and_predict_from_a_saved_run(trained, capsys):
    run_words = ["-c", str(trained / "config.yaml"), "--ckpt_path", str(trained / "checkpoints/best.ckpt")]
    quiet = ["--trainer.callbacks=null", "--data.batch_size=200", "--trainer.limit_val_batches=1.0"]
    module = SpikingClassifier.load_from_checkpoint(trained / "checkpoints/best.ckpt").eval()
    data = Digits()
    for command, part in (("validate", data.val_set), ("test", data.test_set)):
        cli = run([command, *run_words, *quiet])
        x, y = part[:]
        with torch.no_grad():
            right = (module(x).argmax(1) == y).float().mean()
        name = "val" if command == "validate" else "test"
        assert cli.trainer.callback_metrics[f"{name}/acc"] == pytest.approx(float(right), abs=1e-6)
    main(["predict", *run_words, *quiet])
    path = trained / "predictions/best.csv"
    assert f"Logits: {path}" in capsys.readouterr().out
    rows = list(csv.DictReader(path.open()))
    assert [int(row["id"]) for row in rows] == list(range(497))
    with torch.no_grad():
        wanted = module(data.test_set[:][0])
    logits = torch.tensor([[float(row[f"logit_{k}"]) for k in range(10)] for row in rows])
    assert torch.allclose(logits, wanted, atol=1e-5)
    assert [int(row["prediction"]) for row in rows] == logits.argmax(1).tolist()


def test_predictions_of_two_processes_are_in_order(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.rand(7, 1, 2, 2), torch.arange(7) % 3
    trainer = RobustTrainer(accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, enable_progress_bar=False)
    trainer.predict(
        SpikingClassifier(net), DataLoader(TensorDataset(x, y), batch_size=2), return_predictions=False,
        out=tmp_path / "two.csv",
    )  # fmt: skip
    rows = list(csv.reader((tmp_path / "two.csv").open()))
    assert rows[0] == ["id", "prediction", "logit_0", "logit_1", "logit_2"]
    assert torch.allclose(torch.tensor([[float(v) for v in row[2:]] for row in rows[1:]]), net(x), atol=1e-6)


def test_configs_are_put_together_in_order(tmp_path):
    (tmp_path / "more.yaml").write_text(
        "trainer: {max_epochs: 7, callbacks+: [{class_path: EarlyStopping, init_args: {monitor: val/acc}}]}\n"
        "model: {init_args: {label_smoothing: 0.25}}\n"
    )
    cli = run(["fit", *compose(method="at_sr"), "-c", "more.yaml", *TINY, "--model.attack.threat.eps=8/255",
               "--trainer.fast_dev_run=true"])  # fmt: skip
    config = cli.config.fit
    assert isinstance(cli.model, AdversarialClassifier)  # the method's class, with the model's backbone
    assert cli.model.backbone.time_steps == 2
    assert cli.model.label_smoothing == 0.25
    assert config.trainer.max_epochs == 7
    assert isinstance(cli.model.configure_optimizers(), torch.optim.AdamW)
    kinds = [callback.class_path.rsplit(".", 1)[-1] for callback in config.trainer.callbacks]
    assert kinds == ["RobustnessEvaluation", "SparseGradient", "EarlyStopping"]
    assert cli.model.attack.threat.eps == "8/255"
    assert config.model.init_args.attack.init_args.threat.init_args.eps == "8/255"


def test_short_class_names_and_ratios(tmp_path):
    (tmp_path / "short.yaml").write_text(
        """
data: {class_path: Digits, init_args: {batch_size: 2}}
model:
  class_path: AdversarialClassifier
  init_args:
    backbone: {class_path: ConvNet, init_args: {time_steps: 2, neuron: {class_path: LIF, init_args: {beta: 0.9}}}}
    attack: {class_path: PGD, init_args: {threat: {class_path: Linf, init_args: {eps: 1/16}}, step_size: 1/255, steps: 1}}
    optimizer: {class_path: SGD, init_args: {lr: 0.1}}
    lr_scheduler: {class_path: StepLR, init_args: {step_size: 1}}
trainer:
  accelerator: cpu
  fast_dev_run: true
  callbacks: [{class_path: SparseGradient, init_args: {weight: 0.1}}]
"""
    )
    cli = run(["fit", "-c", "short.yaml"])
    assert cli.model.attack == PGD(Linf("1/16"), steps=1, step_size="1/255")
    assert type(cli.model.backbone) is ConvNet
    assert any(isinstance(callback, SparseGradient) for callback in cli.trainer.callbacks)
    text = cli.parser.dump(cli.config)
    assert "eps: 1/16" in text
    assert "step_size: 1/255" in text


def test_a_checkpoint_does_not_override_the_command_line(trained):
    cli = run(["test", "-c", str(trained / "config.yaml"), "--ckpt_path", str(trained / "checkpoints/best.ckpt"),
               "--trainer.callbacks=null", "--model.label_smoothing=0.5", "--model.attack.threat.eps=1/255",
               "--trainer.limit_test_batches=1"])  # fmt: skip
    assert cli.model.label_smoothing == 0.5
    assert cli.model.attack.threat.eps == "1/255"


def test_training_goes_on_from_last(trained):
    words = ["fit", "-c", str(trained / "config.yaml"), "--trainer.callbacks=null", "--trainer.limit_val_batches=0"]
    whole = run(
        [*words, "--trainer.max_epochs=2", "--trainer.callbacks+=SparseGradient", "--trainer.callbacks.weight=0.01"]
    )
    rest = run([*words, "--trainer.max_epochs=2", "--trainer.callbacks+=SparseGradient", "--trainer.callbacks.weight=0.01",
                "--ckpt_path", str(trained / "checkpoints/last.ckpt"), "--seed_everything=3"])  # fmt: skip
    assert rest.trainer.global_step == whole.trainer.global_step == 4
    for a, b in zip(whole.model.state_dict().values(), rest.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_interrupted_runs_say_how_to_go_on():
    words = ["fit", *compose(), *TINY, "--trainer.max_epochs=100000", "--trainer.callbacks=null",
             "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    # A run of tests in the background ignores SIGINT, and hands that on.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from sg_lightning.cli import main; main()"
    started = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True, env=environment)
    last = Path("lightning_logs/version_0/checkpoints/last.ckpt")
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline and started.poll() is None:
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    try:
        _, errors = started.communicate(timeout=120)
    finally:
        started.kill()
    assert started.returncode != 0
    assert "Traceback" not in errors
    found = re.search(r"To go on:  sg-lightning (fit -c \S+ --ckpt_path \S+)", errors)
    assert found, errors[-2000:]
    done = torch.load(last, weights_only=True)["epoch"] + 1
    assert run([*found[1].split(), f"--trainer.max_epochs={done + 1}"]).trainer.current_epoch == done + 1


# -- mistakes -----------------------------------------------------------------------------------------------------------


def mistake(words):
    with pytest.raises(SystemExit) as stop:
        main(words)
    sentence, *rest = str(stop.value).splitlines()
    assert rest == ["(SG_LIGHTNING_TRACEBACK=1 shows where)"]
    return sentence.removeprefix("sg-lightning: ")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--model.backbone.chanels=[4]", "model.backbone: ConvNet has no argument chanels; did you mean channels?"),
        ("--model.attack.stepps=3", "model.attack: PGD has no argument stepps; did you mean steps?"),
        ("--data.batchsize=3", "data: Digits has no argument batchsize; did you mean batch_size?"),
        ("--trainer.max_epoch=3", "there is no option --trainer.max_epoch; did you mean trainer.max_epochs?"),
        ("--trainer.max_epochs=many", "trainer.max_epochs: expected int, got 'many'"),
        ("--model.backbone.hidden=abc", "model.backbone.hidden: expected int, got 'abc'"),
        ("--model.backbone=ConvNett", "model.backbone: there is no class ConvNett; did you mean ConvNet?"),
        ("--model.attack.threat=Lin", "model.attack.threat: there is no class Lin; did you mean Linf?"),
        ("--model.optimizer=SGDD", "model.optimizer: there is no class SGDD; did you mean SGD?"),
        ("--model=torch.nn.Linear", "model: "),
        ("--model.attack.threat.eps=8/x", "eps of Linf must be a number or a ratio like '8/255', got '8/x'"),
        ("--model.attack.threat.eps=-1", "eps of Linf must be finite and >= 0, got -1.0"),
        ("--model.attack.threat.eps=8", "eps=8.0 is wider than the domain Box [0, 1]"),
        ("--model.attack.threat.eps=abc", "eps of Linf must be a number or a ratio like '8/255', got 'abc'"),
        ("--data.batch_size=0", "batch_size must be an integer >= 1, got 0"),
        ("--model.backbone.neuron.surrogate=triangel", "unknown surrogate 'triangel'; choose one of atan"),
        (
            "--trainer.callbacks+=SparseGradient --trainer.callbacks.weigth=1",
            "trainer.callbacks: SparseGradient has no",
        ),
        ("-c nowhere.yaml", "nowhere.yaml'"),
        ("-c broken.yaml", "Problems parsing config: while parsing a flow mapping"),
        ("-c misspelt.yaml", "there is no option trainer.max_epoch; did you mean trainer.max_epochs?"),
        ("-c listed.yaml", "trainer.callbacks: RobustnessEvaluation has no argument suites; did you mean suite?"),
    ],
)
def test_misspelt_keys_and_bad_values(words, sentence):
    Path("broken.yaml").write_text("data: {class_path: Digits\nmodel: [}\n")
    Path("misspelt.yaml").write_text("trainer: {max_epoch: 3}\n")
    Path("listed.yaml").write_text(
        "trainer: {callbacks: [{class_path: RobustnessEvaluation, init_args: {suites: quick}}]}\n"
    )
    assert sentence in mistake(["fit", *compose(method="at", trainer="smoke"), *TINY, *words.split()])


def test_commands_and_missing_parts():
    assert mistake(["trian"]).startswith("there is no command trian; the commands are fit, validate")
    assert "required: fit.data, fit.model; they come from configs" in mistake(["fit"])
    assert "evaluate needs the weights: add --ckpt_path" in mistake(["evaluate", *compose()])
    for command in ("test", "validate", "predict"):
        assert mistake([command, *compose()]).startswith(f"{command} needs the weights")


def test_data_and_network_that_do_not_fit():
    words = ["fit", *compose(method="at", trainer="smoke"), *TINY, "--data.batch_size=2"]
    rasters = [*compose(trainer="smoke"), "--model.backbone=SpikingMLP", "--model.backbone.in_features=6"]
    assert mistake(["fit", *rasters]).startswith("SpikingMLP was built for inputs of shape (B, 4, 6), got (")
    assert "input_size must be at least 16, got 8; pad the images" in mistake(
        [*words, "--model.backbone.channels=[4,4,4,4]"]
    )
    assert mistake([*words, "--model.attack.threat=EventFlips", "--model.attack.threat.eps=2"]) == (
        "x, attacked under EventFlips, has values that are not integers but its domain is Binary {0, 1}"
    )


def test_norms_without_a_budget_are_named(tmp_path):
    (tmp_path / "suite.yaml").write_text("norms: [flips]\nattacks: [{attack: pgd}]\n")
    sentence = mistake(["fit", *compose(method="vanilla", trainer="smoke"), *TINY,
                        "--trainer.callbacks.suite=suite.yaml"])  # fmt: skip
    assert "flips" in sentence
    (tmp_path / "suite.yaml").write_text("norms: [l7]\nattacks: [{attack: pgd}]\n")
    assert "l7" in mistake(["fit", *compose(method="vanilla", trainer="smoke"), *TINY,
                            "--trainer.callbacks.suite=suite.yaml"])  # fmt: skip


def test_missing_data_and_network(tmp_path, monkeypatch):
    words = ["fit", *compose("cifar10", trainer="smoke"), "--data.data_dir=elsewhere"]
    assert f"{tmp_path / 'elsewhere'} lacks cifar-10-python.tar.gz" in mistake([*words, "--data.download=false"])

    def unplugged(*args, **kwargs):
        raise URLError(OSError("Temporary failure in name resolution"))

    monkeypatch.setattr(torch.hub, "download_url_to_file", unplugged)
    sentence = mistake(words)
    assert re.match(
        r"cannot download https?://\S+ \(Temporary failure in name resolution\); check the network", sentence
    )
    assert sentence.endswith(f"put it at {Path('elsewhere/cifar-10-python.tar.gz')}")


def test_damaged_checkpoints_and_rows(trained):
    whole = (trained / "checkpoints/best.ckpt").read_bytes()
    broken = Path("broken.ckpt")
    for size in (0, 2000, len(whole) - 50):
        broken.write_bytes(whole[:size])
        command = {0: "evaluate", 2000: "test"}.get(size, "fit")
        sentence = mistake([command, "-c", str(trained / "config.yaml"), "--ckpt_path", str(broken)])
        assert sentence.startswith("broken.ckpt is no checkpoint, or only a part of one")
    assert "nowhere.ckpt" in mistake(["evaluate", "-c", str(trained / "config.yaml"), "--ckpt_path", "nowhere.ckpt"])
    assert "unknown suite 'standart'" in mistake(evaluate_words(trained, "--suite", "standart"))
    assert "nothing holds no saved result" in mistake(["report", "nothing"])
    main(evaluate_words(trained, "--out", "here", "--trainer.enable_progress_bar=false"))
    rows = Path("here/rows.csv")
    text = rows.read_text()
    half = text[: text.index("\n", len(text) // 2) + 1]
    for part, reason in (
        (half, "of .* rows: it was cut off"),
        (half[:-1], "was cut off in the middle of line"),
        (half + "1,2\n", "line .*: not a row of an evaluation"),
    ):
        rows.write_text(part)
        assert re.search(f"here/rows.csv.*{reason}", mistake(["report", "here"]))
        assert rows.read_text() == part  # nothing is thrown away


def test_folders_that_cannot_be_written(trained):
    Path("file").write_text("in the way")  # root may write to read-only folders, but not below a file
    words = ["fit", *compose(), *TINY, *SHORT, "--trainer.callbacks=null"]
    sentence = mistake([*words, "--trainer.default_root_dir=file"])
    assert re.fullmatch(
        r"cannot read or write \S+/file/lightning_logs: Not a directory; choose another folder", sentence
    )
    assert "choose another out=" in mistake(evaluate_words(trained, "--out", "file/here"))
    predict = ["predict", "-c", str(trained / "config.yaml"), "--ckpt_path", str(trained / "checkpoints/best.ckpt")]
    assert "cannot write file/here.csv" in mistake([*predict, "--out", "file/here.csv"])
    assert "file/configs" in mistake(["configs", "--to", "file/configs"])
    assert Path("file").read_text() == "in the way"


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disks(trained, monkeypatch):
    words = evaluate_words(trained, "--out", "here", "--trainer.enable_progress_bar=false")
    with monkeypatch.context() as patch:
        patch.setattr(RowStore, "append", full_from(RowStore.append, "os.fsync", patch))
        sentence = mistake(words)
    assert sentence.startswith(
        "cannot write rows to here/rows.csv: No space left on device; mend that and run the same"
    )
    main(words)
    assert len(RobustnessResult.load("here").ids) == 17
    with monkeypatch.context() as patch:
        patch.setattr("torch.save", lambda *args: (_ for _ in ()).throw(RuntimeError("file write failed")))
        assert mistake(evaluate_words(trained, "--out", "there")).startswith("cannot write rows to there/rows.csv: ")
    monkeypatch.setattr("lightning.fabric.plugins.io.torch_io._atomic_save", no_space)
    assert mistake(["fit", *compose(), *TINY, *SHORT, "--trainer.callbacks=null"]) == (
        "cannot read or write a file: No space left on device; make room, and go on from the last checkpoint or run the "
        "same again"
    )


def full_from(function, name, patch):
    """Run a function on a full disk."""

    def on_full_disk(*args, **kwargs):
        with patch.context() as full:
            full.setattr(name, no_space)
            return function(*args, **kwargs)

    return on_full_disk


def test_folders_without_permission(trained, monkeypatch):
    make = Path.mkdir

    def denied(path, *args, **kwargs):
        if path.parts[0] == "locked":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        make(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", denied)  # root may write anywhere
    assert mistake(evaluate_words(trained, "--out", "locked")) == (
        "cannot write rows to locked: Permission denied; choose another out="
    )
    assert mistake(["configs", "--to", "locked"]).startswith("cannot read or write locked")


def test_a_logger_that_is_not_installed(monkeypatch):
    lacking = RequirementCache("not-installed-logger>=1.0")
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", lacking)
    sentence = mistake(["fit", *compose(trainer="smoke"), *TINY, "--trainer.logger=WandbLogger"])
    assert "Problem with" not in sentence
    assert "not-installed-logger>=1.0' not met. HINT: Try running `pip install" in sentence


def test_mistakes_show_where_on_demand(monkeypatch):
    monkeypatch.setenv("SG_LIGHTNING_TRACEBACK", "1")
    with pytest.raises(ValueError, match="there is no command"):
        main(["trian"])


# -- help ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "evaluate", "report", "configs"])
def test_help_of_each_command(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: sg-lightning {command} ")
    assert command in ("report", "configs") or shown.index(f"\noptions of {command}:") < shown.index("\nhow to train:")
    assert " ".join(COMMANDS[command].split()) in " ".join(shown.split())
    assert "torch.nn." not in shown
    assert ":class:" not in shown.split("--trainer.accelerator")[0]


def test_help_fits_the_terminal_and_names_every_command(capsys):
    for words in ([], ["--help"], ["-h"]):
        main(words)
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= 100
        assert all(f"\n  {command} " in shown for command in COMMANDS)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert __version__ in capsys.readouterr().out
