"""How contestants are timed, and where and with what."""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def race(
    contestants: Mapping[str, Callable[[int], Result]], rounds: int, look: Callable[[str, Result], None]
) -> dict[str, list[float]]:
    """Time contestants in turns, in reversed order every other round, and return CPU seconds by name.

    One CPU-time clock for all, in one process: other jobs on the machine and its changing speed fall on everybody.

    Args:
        contestants: What to time; each is called with the number of the round.
        rounds: Measured rounds, at least 1; one more, not measured, warms up.
        look: Told of every result, the warm-up's too, outside the measured time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        order = list(contestants) if number % 2 else list(contestants)[::-1]
        for name in order:
            gc.collect()
            started = time.process_time()
            result = contestants[name](number)
            spent = time.process_time() - started
            if number:
                seconds[name].append(spent)
            look(name, result)
    return seconds


def ratios(seconds: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Compare round by round, so that a slow minute of the machine cancels."""
    return [a / b for a, b in zip(seconds, reference, strict=True)]


def provenance(packages: Sequence[str]) -> dict[str, Any]:
    """Say with which command, code, machine and versions figures were made."""
    here = Path(__file__).parent
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": _output("git", "-C", str(here), "describe", "--always", "--dirty"),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": f"{_processor()}, {torch.get_num_threads()} thread",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages if _version(name)},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
