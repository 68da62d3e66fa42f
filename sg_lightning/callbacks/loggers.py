"""Figures and tables for any logger.

Teach them another logger with ``@log_figure.register(MyLogger)`` and ``@log_table.register(MyLogger)``.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import singledispatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger

from sg_lightning.evaluation import RobustnessResult
from sg_lightning.evaluation.statistics import share_of
from sg_lightning.threats import is_relaxed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def folder_of(logger: Logger) -> Path:
    """Return the folder of this run of a logger; no two runs share one."""
    own = getattr(logger, "log_dir", None)
    return Path(own) if own else Path(logger.save_dir or ".") / str(logger.name) / str(logger.version)


def _file(logger: Logger, kind: str, name: str, step: int, ending: str) -> Path:
    """Return where a logger that cannot show something gets it as a file."""
    path = folder_of(logger) / kind / f"{name.replace('/', '_')}_{step}.{ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@singledispatch
def log_figure(logger: Logger, name: str, figure: Figure, step: int) -> None:
    """Log a matplotlib figure; a logger without pictures gets a PNG in its folder.

    Args:
        logger: Where to.
        name: Name such as ``robust/curves``.
        figure: The figure.
        step: Global step.
    """
    figure.savefig(_file(logger, "figures", name, step, "png"))


@singledispatch
def log_table(logger: Logger, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
    """Log a table; a logger without tables gets a CSV file in its folder.

    Args:
        logger: Where to.
        name: Name such as ``robust/table``.
        columns: Headings.
        rows: One sequence per row.
        step: Global step.
    """
    with _file(logger, "tables", name, step, "csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


@singledispatch
def log_animation(logger: Logger, name: str, gif: bytes, step: int) -> None:
    """Log an animated GIF; a logger without moving pictures gets a file in its folder.

    Args:
        logger: Where to.
        name: Name such as ``robust/animation``.
        gif: Content of the file.
        step: Global step.
    """
    _file(logger, "figures", name, step, "gif").write_bytes(gif)


@log_animation.register(DummyLogger)
def _(logger: DummyLogger, name: str, gif: bytes, step: int) -> None:
    pass


@log_animation.register(WandbLogger)
def _(logger: WandbLogger, name: str, gif: bytes, step: int) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "animation.gif"
        path.write_bytes(gif)
        logger.log_video(key=name, videos=[str(path)], step=step, format=["gif"])  # copied at once


@log_figure.register(DummyLogger)
def _(logger: DummyLogger, name: str, figure: Figure, step: int) -> None:
    pass


@log_table.register(DummyLogger)
def _(logger: DummyLogger, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
    pass


@log_figure.register(WandbLogger)
def _(logger: WandbLogger, name: str, figure: Figure, step: int) -> None:
    logger.log_image(key=name, images=[figure], step=step)


@log_table.register(WandbLogger)
def _(logger: WandbLogger, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
    logger.log_table(key=name, columns=list(columns), data=[list(row) for row in rows], step=step)


@log_figure.register(TensorBoardLogger)
def _(logger: TensorBoardLogger, name: str, figure: Figure, step: int) -> None:
    logger.experiment.add_figure(name, figure, step)


@log_table.register(TensorBoardLogger)
def _(logger: TensorBoardLogger, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [["" if cell is None else str(cell) for cell in line] for line in lines]
    logger.experiment.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in cells), step)


TABLE = ("norm", "eps", "attack", "steps", "restarts", "n", "seed", "accuracy", "low", "high")


def table_rows(result: RobustnessResult) -> list[list[Any]]:
    """Return one row per norm, budget and attack: its settings, and the accuracy left after it and those before it.

    A column holds one type, or ``None`` where it does not apply (W&B refuses mixed ones).
    """
    n, seed = len(result.ids), result.meta.get("seed")
    clean = share_of(int(result.clean_correct.sum()), n)
    rows: list[list[Any]] = [[None, None, "clean", None, None, n, seed, *clean]]
    for entry in result.suite.entries:
        for name, attack in zip(entry.names, entry.attacks, strict=True):
            share = result.after(entry.norm, entry.eps, name)
            rows.append([
                f"{entry.norm} (infeasible)" if is_relaxed(entry.norm) else entry.norm, entry.eps,
                attack["attack"], attack.get("steps"), attack.get("restarts"), n, seed, *share,
            ])  # fmt: skip
    return rows


def log_result(logger: Logger, result: RobustnessResult, step: int) -> None:
    """Give a result to a logger: a table, and accuracy over budget if matplotlib is there."""
    log_table(logger, "robust/table", TABLE, table_rows(result), step)
    try:
        from sg_lightning.reporting import accuracy_curves, animation, examples_figure

        log_figure(logger, "robust/curves", accuracy_curves({"this run": result}), step)
        if result.examples:
            log_figure(logger, "robust/examples", examples_figure(result), step)
        moving = animation(result)
    except ImportError:
        return
    if moving is not None:
        log_animation(logger, "robust/animation", moving, step)
