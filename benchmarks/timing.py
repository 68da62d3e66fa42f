"""How contestants are timed, and where and with what."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def race(
    contestants: Mapping[str, Callable[[int], Result]],
    rounds: int,
    look: Callable[[str, Result], None],
    once: Collection[str] = (),
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Time contestants in turns, in reversed order every other round, and return seconds by name.

    One clock for all, of CPU time by default, in one process: other jobs on the machine and its changing speed fall on
    everybody.

    Args:
        contestants: What to time; each is called with the number of the round, and warmed up by the caller.
        rounds: Number of rounds, at least 1.
        look: Told of every result, outside the measured time.
        once: Who runs in the first round only, because it is slow.
        clock: Tells seconds; on a GPU, once it has done what it was asked to.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        order = list(contestants)[::-1] if number % 2 else list(contestants)
        for name in order:
            if number and name in once:
                continue
            gc.collect()
            started = clock()
            result = contestants[name](number)
            spent = clock() - started
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
        "allocator": {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")},
    }


def save(results: dict[str, Any], text: str, folder: Path, name: str) -> None:
    """Write results as JSON and their table as Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(text, encoding="utf-8")


def into_docs(text: str, path: Path, name: str) -> None:
    """Put the table of a results file between its marks in a document."""
    begin, end = f"<!-- begin: benchmarks/results/{name} -->", "<!-- end -->"
    before, rest = path.read_text(encoding="utf-8").split(begin)
    path.write_text(f"{before}{begin}\n{text}{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def measured(made: dict[str, Any]) -> str:
    """Write a provenance as the start of a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    allocator = "".join(f"{name}={value} " for name, value in made.get("allocator", {}).items())
    return (
        f"Measured with `{allocator}{made['command']}` at commit {made['commit']}, {made['date']}; {made['machine']}; Python "
        f"{made['python']}, {versions}"
    )


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
