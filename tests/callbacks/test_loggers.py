"""What W&B, TensorBoard and CSV hold after a run of the command line, read back from their own files."""

import csv
import json
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning_utilities.core.imports import RequirementCache
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sg_lightning.callbacks.loggers import TABLE, log_animation
from sg_lightning.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"
WORDS = [word for name in ("data/digits", "model/convnet", "method/vanilla", "trainer/cpu")
         for word in ("-c", str(CONFIGS / f"{name}.yaml"))]  # fmt: skip
TINY = ["--model.backbone.time_steps=2", "--model.backbone.channels=[4,4]", "--model.backbone.hidden=8"]
SHORT = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1",
         "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
         "--trainer.log_every_n_steps=1", "--data.batch_size=16"]  # fmt: skip
LOGGERS = """
trainer:
  logger:
    - {class_path: WandbLogger, init_args: {project: digits, offline: true}}
    - {class_path: TensorBoardLogger, init_args: {save_dir: boards, name: digits}}
    - {class_path: CSVLogger, init_args: {save_dir: sheets, name: digits}}
"""
SCALARS = {
    "train/loss", "train/acc", "val/loss", "val/acc", "train/sg_penalty", "train/sg_fidelity", "robust/clean/acc",
    "robust/union/acc", "robust/min/acc", *(f"robust/{n}/{what}" for n in ("linf_2_16", "l2_0p5", "l1_1p5", "l0_2")
                                            for what in ("acc", "random_acc", "gap")),
}  # fmt: skip
BLOCK, HEADER = 32768, 7  # of the log format of LevelDB, in which W&B writes


def records(path):
    """Read a .wandb file: records in fragments (crc, length, type), after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, held = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:  # the rest of a block is padding
            at += BLOCK - at % BLOCK
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        held += content[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4):  # whole, or last fragment
            record = Record()
            record.ParseFromString(held)
            held = b""
            yield record


def of_wandb(folder):
    """Return config, history (the values by name) of an offline run."""
    (path,) = folder.glob("run-*.wandb")
    config, history = {}, {}
    for record in records(path):
        for item in record.run.config.update if record.HasField("run") else record.config.update:
            config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        for item in record.history.item:
            history.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    return config, history


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of the same command."""
    import wandb

    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["sg-lightning"])
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_MODE", "offline")  # the logger sets it too, and would leave it behind
        Path("loggers.yaml").write_text(LOGGERS)
        every = ["--trainer.callbacks.every_n_epochs=1", "--trainer.callbacks.max_samples=16",
                 "--trainer.callbacks+=SparseGradient", "--trainer.callbacks.weight=0.02"]  # fmt: skip
        for _ in range(2):
            main(["fit", *WORDS, "-c", "loggers.yaml", *TINY, *SHORT, *every])
            wandb.finish()
    return folder


@pytest.fixture(scope="module")
def sheet(runs):
    """The CSV logger's files: values by name, and the table."""
    with (runs / "sheets/digits/version_0/metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    values = {name: [float(line[name]) for line in lines if line[name]] for name in lines[0]}
    (path,) = (runs / "sheets/digits/version_0/tables").iterdir()
    with path.open() as file:
        return values, list(csv.reader(file))


def test_scalars_have_the_same_names_and_values_everywhere(runs, sheet):
    values, _ = sheet
    assert set(values) >= SCALARS
    _, history = of_wandb(min((runs / "wandb").glob("offline-run-*")))
    board = EventAccumulator(str(runs / "boards/digits/version_0")).Reload()
    for name in SCALARS:
        assert len(values[name]) == 2  # epochs
        assert history[name] == pytest.approx(values[name], rel=1e-6)
        assert [event.value for event in board.Scalars(name)] == pytest.approx(values[name], rel=1e-6)


def test_the_table_says_what_was_attacked_and_how(runs, sheet):
    values, lines = sheet
    assert lines[0] == list(TABLE)
    assert lines[1][:8] == ["", "", "clean", "", "", "16", "0", str(values["robust/clean/acc"][-1])]
    assert [line[:7] for line in lines[2:]] == [
        ["linf", "2/16", "pgd", "10", "1", "16", "0"],
        ["l2", "0.5", "pgd", "10", "1", "16", "0"],
        ["l1", "1.5", "pgd", "10", "1", "16", "0"],
        ["l0", "2", "pgd", "10", "1", "16", "0"],
    ]
    assert float(lines[2][7]) == values["robust/linf_2_16/acc"][-1]
    assert all(float(line[8]) <= float(line[7]) <= float(line[9]) for line in lines[1:])
    (path,) = min((runs / "wandb").glob("offline-run-*")).glob("files/media/table/robust/*.json")
    table = json.loads(path.read_text())
    assert table["columns"] == lines[0]
    assert [["" if cell is None else str(cell) for cell in row] for row in table["data"]] == lines[1:]
    board = EventAccumulator(str(runs / "boards/digits/version_0")).Reload()
    (event,) = board.Tensors("robust/table/text_summary")
    text = event.tensor_proto.string_val[0].decode().splitlines()
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in (text[0], *text[2:])] == lines


def test_figures_are_pictures(runs):
    board = EventAccumulator(str(runs / "boards/digits/version_0")).Reload()
    (picture,) = board.Images("robust/curves")
    (wandb_file,) = min((runs / "wandb").glob("offline-run-*")).glob("files/media/images/robust/curves*.png")
    (csv_file,) = (runs / "sheets/digits/version_0/figures").iterdir()
    for content in (picture.encoded_image_string, wandb_file.read_bytes(), csv_file.read_bytes()):
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5000


def test_each_run_keeps_its_whole_config_callbacks_included(runs):
    offline = sorted((runs / "wandb").glob("offline-run-*"))
    assert len(offline) == 2
    for k, folder in enumerate(offline):
        config, _ = of_wandb(folder)
        callbacks = {
            item["class_path"].split(".")[-1]: item["init_args"] for item in config["config"]["trainer"]["callbacks"]
        }
        assert callbacks["SparseGradient"]["weight"] == 0.02
        assert callbacks["RobustnessEvaluation"]["suite"] == "quick"
        assert callbacks["RobustnessEvaluation"]["every_n_epochs"] == 1
        assert config["config"]["model"]["init_args"]["backbone"]["init_args"]["channels"] == [4, 4]
        run = folder.name.split("-")[-1]
        files = [f"digits/{run}", f"boards/digits/version_{k}", f"sheets/digits/version_{k}"]
        texts = {(runs / file / "config.yaml").read_text() for file in files}
        assert len(texts) == 1
        assert yaml.safe_load(texts.pop()) == config["config"]


def test_moving_pictures_reach_wandb_and_become_files_elsewhere(tmp_path, monkeypatch):
    import wandb

    gif = b"GIF89a\x01\x00\x01\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff,\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;"
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_animation(WandbLogger(project="p", offline=True, save_dir=tmp_path), "robust/animation", gif, 3)
    wandb.finish()
    (path,) = (tmp_path / "wandb").glob("offline-run-*/files/media/videos/robust/*.gif")
    assert path.read_bytes() == gif
    log_animation(CSVLogger(tmp_path, name="runs"), "robust/animation", gif, 3)
    assert (tmp_path / "runs" / "version_0" / "figures" / "robust_animation_3.gif").read_bytes() == gif


def test_without_wandb_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    absent = RequirementCache("wandb_is_not_here>=0.12")
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", absent)
    with pytest.raises(ModuleNotFoundError, match=r"^Requirement 'wandb_is_not_here>=0.12' not met\. HINT: .*$"):
        WandbLogger()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sg-lightning"])
    with pytest.raises(SystemExit, match=r"Requirement 'wandb_is_not_here>=0\.12' not met"):
        main(["fit", *WORDS, "--trainer.logger=WandbLogger"])
