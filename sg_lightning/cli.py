"""The command line: ``sg-lightning fit|validate|test|predict|evaluate|report|configs``."""

from __future__ import annotations

import argparse
import filecmp
import logging
import os
import shutil
import sys
import textwrap
import warnings
import zipfile
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined] # public, but not in __all__ of the type checker
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

# Classes can be given by name only once their modules are imported.
from sg_lightning._version import __version__
from sg_lightning.callbacks.loggers import folder_of
from sg_lightning.evaluation import RobustnessResult
from sg_lightning.modules import SpikingClassifier
from sg_lightning.recipes import accepted, look_up
from sg_lightning.trainer import RobustTrainer

# What the data may know about the network; where they do not, or the network has no such argument, it is left alone.
LINKED = ("num_classes", "in_channels", "input_size", "mean", "std", "in_features", "time_steps", "values", "sizes")
TITLES = {
    "trainer": "how to train: Lightning's Trainer",
    "model": "what to train: the module, with its backbone, optimiser and attack",
    "data": "the data",
    "checkpoint": "which weights are kept: Lightning's ModelCheckpoint",
}
# Warnings about what this package chose, or what Lightning and PyTorch have to settle among themselves.
NOISE = (
    "The dirpath has changed",
    ".*isinstance\\(treespec, LeafSpec\\)",
    ".*does not have many workers",
    "The number of training batches",
)
COMMANDS = {
    "fit": "Train a network. Config and checkpoints of the run go to lightning_logs/version_N, or where the logger says.",
    "validate": "Measure loss and accuracy of a checkpoint on the validation set, and what the callbacks measure.",
    "test": "Measure loss and accuracy of a checkpoint on the test set, and what the callbacks measure.",
    "predict": "Write the logits of a checkpoint for every test sample as a CSV file: id, prediction, logit_0, ...",
    "evaluate": "Attack a checkpoint on the test set with a suite of attacks; an interrupted run goes on where it stopped.",
    "report": "Make one HTML page of several evaluations.",
    "configs": "Copy the shipped configs into a folder, or list them.",
}
HELP = """usage: sg-lightning COMMAND [-c CONFIG ...] [--KEY=VALUE ...]

Train spiking networks, attack them, report.

commands:
{commands}

configs:
  Several -c FILE are put together, later ones over earlier ones: data, model, method, trainer.
  Single keys follow, as --model.backbone.time_steps=8 or --model.attack.threat.eps=8/255.
  Number of classes, image size and normalisation of the network come from the data.

a first run:
  sg-lightning configs --to configs
  sg-lightning fit -c configs/data/digits.yaml -c configs/model/convnet.yaml \\
      -c configs/method/sr.yaml -c configs/trainer/cpu.yaml
  sg-lightning evaluate -c lightning_logs/version_0/config.yaml \\
      --ckpt_path lightning_logs/version_0/checkpoints/best.ckpt
  sg-lightning report lightning_logs/version_0/robustness/best-basic

more help:
  sg-lightning COMMAND --help                          every option of a command
  sg-lightning fit --model.help AdversarialClassifier  every argument of a class
  sg-lightning fit -c ... --print_config               the whole config of a command
  sg-lightning --version
"""


class RobustParser(LightningArgumentParser):
    """Keeps linked arguments in a printed config where the data do not know them; jsonargparse leaves out all of them."""

    def dump(self, cfg: Any, *args: Any, **kwargs: Any) -> str:
        """Return the config as YAML."""
        text = super().dump(cfg, *args, **kwargs)
        data, network = look_up(str(cfg.get("data.class_path"))), cfg.get("model.init_args.backbone.init_args")
        if data is None or network is None:
            return text
        known = {*dir(data), *accepted(data)}
        kept = {name: network[name] for name in LINKED if name in network and name not in known}
        content = yaml.safe_load(text)
        content["model"]["init_args"]["backbone"]["init_args"].update(kept)
        return yaml.safe_dump(content, sort_keys=False)


class SaveRunConfig(SaveConfigCallback):
    """Write the whole config, callbacks and attacks included, into the folder of every logger, and log it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save to each logger's own folder (``trainer.log_dir`` is shared by all runs of some loggers)."""
        content = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        # jsonargparse leaves out what comes from the data, but the config should say how the network was built.
        backbone = content["model"]["init_args"].get("backbone") or {}
        for name in LINKED:
            value = getattr(getattr(trainer, "datamodule", None), name, None)
            if value is not None and "init_args" in backbone and name in accepted(type(pl_module.backbone)):
                backbone["init_args"][name] = list(value) if isinstance(value, tuple) else value
        text = yaml.safe_dump(content, sort_keys=False)
        try:
            for folder in {folder_of(logger) for logger in trainer.loggers} or {Path(trainer.default_root_dir)}:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / self.config_filename).write_text(text, encoding="utf-8")
        except OSError as error:
            raise OSError(
                f"cannot write the run to {error.filename or 'its folder'}: {error.strerror or error}; choose another "
                "--trainer.default_root_dir, or folder of the logger"
            ) from error
        for logger in trainer.loggers:
            logger.log_hyperparams({"config": content})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say how an interrupted training goes on."""
        if not isinstance(exception, KeyboardInterrupt) or not trainer.is_global_zero:
            return
        last = getattr(trainer.checkpoint_callback, "last_model_path", "")
        if last and trainer.loggers:
            config = folder_of(trainer.loggers[0]) / self.config_filename
            print(f"\nInterrupted. To go on:  sg-lightning fit -c {config} --ckpt_path {last}", file=sys.stderr)
        else:
            print("\nInterrupted before the first checkpoint", file=sys.stderr)


class RobustCLI(LightningCLI):
    """LightningCLI with ``evaluate``, checkpoints of the best and the last epoch, and data that shape the network."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands, each with the arguments that the command line does not set."""
        return {**LightningCLI.subcommands(), "evaluate": {"model", "datamodule"}}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Build a parser."""
        parser = RobustParser(**kwargs)
        parser.add_argument(
            "-c", "--config", action=ActionConfigFile, help="a YAML file; later ones go over earlier ones"
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add checkpointing, and give the network the sizes of the data."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({
            "checkpoint.monitor": "val/acc", "checkpoint.mode": "max", "checkpoint.save_last": True,
            "checkpoint.filename": "best", "checkpoint.enable_version_counter": False,
        })  # fmt: skip
        for key, title in TITLES.items():
            (parser.groups or {})[key].title = title  # the classes' first lines do not say what they are here
        for name in LINKED:
            parser.link_arguments(f"data.{name}", f"model.init_args.backbone.init_args.{name}", apply_on="instantiate")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Show the few options of the command itself before the hundreds that all commands share."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        *shared, own = parser._action_groups
        own.title = f"options of {subcommand}"
        parser._action_groups = [*shared[:2], own, *shared[2:]]
        return parser

    def _parse_ckpt_path(self) -> None:
        """Check the file; leave the settings alone: Lightning would let the checkpoint's override the command line."""
        path = self.config[self.config.subcommand].get("ckpt_path") if self.config.get("subcommand") else None
        if path and Path(path).is_file() and not zipfile.is_zipfile(path):
            raise ValueError(
                f"{path} is no checkpoint, or only a part of one: it was cut off while it was written or copied"
            )

    def before_evaluate(self) -> None:
        """Refuse to measure untrained weights."""
        if self._get(self.config, "ckpt_path") is None:
            raise ValueError(f"{self.subcommand} needs the weights: add --ckpt_path .../checkpoints/best.ckpt")

    before_validate = before_test = before_predict = before_evaluate

    def after_predict(self) -> None:
        """Say where the logits are."""
        if self.trainer.is_global_zero and isinstance(self.trainer, RobustTrainer):
            print(f"\nLogits: {self.trainer.predictions}")

    def after_evaluate(self) -> None:
        """Show the figures."""
        trainer = self.trainer
        if trainer.is_global_zero and isinstance(trainer, RobustTrainer) and trainer.result is not None:
            where = f"\n\nResult: {trainer.result_folder}\nA page of it:  sg-lightning report {trainer.result_folder}"
            print(f"\n{trainer.result.table()}{where if trainer.result_folder is not None else ''}")

    def after_fit(self) -> None:
        """Say where the run is."""
        callback = self.trainer.checkpoint_callback
        best = getattr(callback, "best_model_path", "")
        if best and self.trainer.is_global_zero and self.trainer.loggers:
            config = folder_of(self.trainer.loggers[0]) / "config.yaml"
            print(f"\nBest weights: {best}\nAttack them:  sg-lightning evaluate -c {config} --ckpt_path {best}")


def run(args: Sequence[str] | None) -> RobustCLI:
    """Run a command of the trainer; ``args`` as on the command line."""
    words = sys.argv[1:] if args is None else list(args)
    chosen = {name: hidden for name, hidden in RobustCLI.subcommands().items() if name in words[:1]}

    class OneCommand(RobustCLI):
        """The parser of a command takes its time to build, so those of the others are left out."""

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return chosen or RobustCLI.subcommands()

    # A misspelt option must not pass as the abbreviation of another, and main() words the errors.
    strict = {"allow_abbrev": False, "exit_on_error": False}
    commands = {
        name: {
            "usage": f"sg-lightning {name} [-c CONFIG ...] [--KEY=VALUE ...]",
            "description": COMMANDS[name],
            **strict,
        }
        for name in OneCommand.subcommands()
    }
    return OneCommand(
        SpikingClassifier,
        LightningDataModule,
        save_config_callback=SaveRunConfig,
        trainer_class=RobustTrainer,
        seed_everything_default=0,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        parser_kwargs={"version": __version__, "prog": "sg-lightning", **strict, **commands},
        args=list(args) if args is not None else None,
    )


def report(args: Sequence[str]) -> None:
    """Make one page of several evaluations."""
    parser = argparse.ArgumentParser("sg-lightning report", description=COMMANDS["report"])
    parser.add_argument(
        "folders", nargs="+", metavar="[NAME=]FOLDER", help="an --out of evaluate; named after the folder"
    )
    parser.add_argument("--out", default="report", help="folder of report.html and its figures")
    parser.add_argument("--title", default="Robustness across perturbation norms", help="heading of the page")
    parser.add_argument("--baseline", help="name of the run that the others are compared with")
    given = parser.parse_args(list(args))
    from sg_lightning.reporting import write_report

    results = {}
    for text in given.folders:
        name, _, folder = text.rpartition("=")
        name = name or Path(folder).name
        if name in results:
            raise ValueError(f"two runs are called {name!r}; name them: first={folder}")
        results[name] = RobustnessResult.load(folder)
    print(f"Report: {write_report(results, given.out, title=given.title, baseline=given.baseline)}")


def configs(args: Sequence[str]) -> None:
    """Copy the shipped configs."""
    parser = argparse.ArgumentParser("sg-lightning configs", description=COMMANDS["configs"])
    parser.add_argument("--to", type=Path, help="folder to copy into; without it they are listed")
    given = parser.parse_args(list(args))
    with as_file(files("sg_lightning").joinpath("configs")) as source:
        found = sorted(path.relative_to(source) for path in source.rglob("*.yaml"))
        if given.to is None:
            print("\n".join(map(str, found)))
            return
        there = [path for path in found if (given.to / path).exists()]
        changed = [path for path in there if not filecmp.cmp(source / path, given.to / path, shallow=False)]
        if changed:
            raise ValueError(f"{given.to / changed[0]} differs from the shipped one; give another folder, or delete it")
        for path in {*found} - {*there}:
            (given.to / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, given.to / path)
    print(f"{len(found)} configs in {given.to}")


def _no_advertisement(record: logging.LogRecord) -> bool:
    """Drop Lightning's tip to install another product of its makers."""
    return "litlogger" not in record.getMessage()


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; mistakes are said in one sentence."""
    words = sys.argv[1:] if args is None else list(args)
    if not words or words[0] in ("-h", "--help"):
        lines = [
            textwrap.fill(text, 98, initial_indent=f"  {name:<10}", subsequent_indent=" " * 12)
            for name, text in COMMANDS.items()
        ]
        print(HELP.format(commands="\n".join(lines)), end="")
        return
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisement)
    for noise in NOISE:
        warnings.filterwarnings("ignore", noise)
    try:
        if not words[0].startswith("-") and words[0] not in COMMANDS:
            raise ValueError(f"there is no command {words[0]}; the commands are {', '.join(COMMANDS)}")
        if words[0] == "report":
            report(words[1:])
        elif words[0] == "configs":
            configs(words[1:])
        else:
            run(words if args is not None else None)
    except KeyboardInterrupt:
        sys.exit("sg-lightning: interrupted")
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, argparse.ArgumentError) as error:
        if os.environ.get("SG_LIGHTNING_TRACEBACK"):
            raise
        from sg_lightning.mistakes import explain

        sys.exit(f"sg-lightning: {explain(error)}\n(SG_LIGHTNING_TRACEBACK=1 shows where)")


if __name__ == "__main__":
    main()
