"""Mistakes on the command line and in configs, said in one sentence.

jsonargparse reports every alternative that it tried for a value, with dumps of the whole namespace; here the first reason
is kept, with the key that it is about and the nearest name.
"""

from __future__ import annotations

import errno
import inspect
import re
from collections.abc import Iterable
from difflib import get_close_matches

from lightning.pytorch import Trainer, callbacks
from torch import optim

from sg_lightning import attacks, backbones, datamodules, modules, neurons, recipes, threats
from sg_lightning import callbacks as own_callbacks

_NOISE = re.compile(
    r"Does not validate against any of|Subtypes:|Errors:|Expected a path but|Expected a <class 'NoneType'>|Given value|$"
)
_KEY = re.compile(r'Parser key "([^"]+)":\s*(.*)')
_OWNER = re.compile(r"Problem with given class_path '([^']+)':")
_ROOMS = (
    attacks,
    backbones,
    callbacks,
    datamodules,
    modules,
    neurons,
    optim,
    optim.lr_scheduler,
    own_callbacks,
    threats,
)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean ...?"`` with the nearest known word, or nothing if none is near."""
    found = get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f"; did you mean {found[0]}?" if found else ""


def explain(error: BaseException) -> str:
    """Return what was wrong, where, and what may have been meant."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        full = error.errno == errno.ENOSPC
        cure = (
            "make room, and go on from the last checkpoint or run the same again" if full else "choose another folder"
        )
        return f"cannot read or write {error.filename or 'a file'}: {error.strerror}; {cure}"
    unknown = re.match(r"unrecognized arguments: (\S+)|Subcommand '\w+' does not accept option '([^']+)'", text)
    if unknown:
        word = (unknown[1] or unknown[2]).partition("=")[0]
        options = [
            "model",
            "data",
            "checkpoint",
            "ckpt_path",
            *(f"trainer.{n}" for n in inspect.signature(Trainer).parameters),
        ]
        return f"there is no option {word}{nearest(word.lstrip('-'), options)}"
    if text.startswith("the following arguments are required"):
        return f"{text}; they come from configs (-c FILE): `sg-lightning configs` lists those that are shipped"
    if text.startswith("Problems parsing config"):
        return " ".join(text.split())
    if not _KEY.search(text) and "Subtypes:" not in text:
        return text
    keys: list[str] = []
    owner = ""
    for line in text.splitlines():
        reason = line.strip().removeprefix("- ")
        if key := _KEY.match(reason):
            keys.append(key[1])
            reason = key[2]
        if made := _OWNER.match(reason):
            owner = made[1]
        elif not _NOISE.match(reason):
            return ": ".join(filter(None, [".".join(keys), _rephrase(reason, owner, text)]))
    return text


def _rephrase(reason: str, owner: str, text: str) -> str:
    """Say a reason of jsonargparse in the words of the user."""
    if option := re.match(r"Option '([^']+)' is not accepted", reason):
        kind = recipes.look_up(owner)
        known = recipes.accepted(kind) if inspect.isclass(kind) else ()
        name = option[1].rsplit(".", 1)[-1]
        return f"{owner.rsplit('.', 1)[-1]} has no argument {name}{nearest(name, known)}"
    if path := re.match(r"Expected a dot import path string: (.*)", reason):
        names = [name for room in _ROOMS for name in vars(room) if name[:1].isupper()]
        return f"there is no class {path[1]}{nearest(path[1], names)}"
    if kind_wanted := re.match(r"Expected a <class '(\w+)'>(?:\. Got value: (.*))?", reason):
        given = kind_wanted[2] or text.rsplit("Given value: ", 1)[-1].strip()
        return f"expected {kind_wanted[1]}, got {given!r}"
    return reason
