"""What a checkpoint of a :class:`SpikingClassifier` says about how to build it, written and read."""

from __future__ import annotations

import pickle
import zipfile
from contextlib import nullcontext
from typing import Any, TypeVar

import fsspec
import torch
from lightning.pytorch import LightningModule

from sg_lightning import recipes

_KEY = "recipe"
_Module = TypeVar("_Module", bound=LightningModule)


def write(module: recipes.Recorded, checkpoint: dict[str, Any], forgotten: dict[str, str]) -> None:
    """Put class and arguments of a module into its checkpoint; what cannot be stored only with the reason."""
    arguments, missing = module.arguments()
    try:
        path = recipes.class_path(type(module))
    except recipes.NotStorable:
        path = None
    checkpoint[LightningModule.CHECKPOINT_HYPER_PARAMS_KEY] = arguments
    checkpoint[_KEY] = {"class_path": path, "missing": {**forgotten, **missing}}


def read(path: Any, map_location: Any = "cpu", weights_only: bool = True) -> dict[str, Any]:
    """Read a checkpoint: a file, a URL that fsspec knows, or a file-like object.

    Raises:
        ValueError: if it is no checkpoint, or only a part of one.
        FileNotFoundError: if there is none.
    """
    try:
        with nullcontext(path) if hasattr(path, "read") else fsspec.open(str(path), "rb") as file:
            content = torch.load(file, map_location, weights_only=weights_only)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise type(error)(f"cannot read the checkpoint {path}: {error.strerror}") from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
            raise ValueError(
                f"{path} holds more than tensors and plain values, which may run code; only if you trust whoever wrote it, "
                "load it with weights_only=False"
            ) from error
        raise ValueError(
            f"{path} is no checkpoint, or only a part of one: it was cut off while it was written or copied"
        ) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"{path} is no checkpoint of a LightningModule: it has no state_dict")
    return content


def kind_of(content: dict[str, Any], cls: type[_Module]) -> type[_Module]:
    """Return the class that a checkpoint holds, if it is a kind of ``cls``; else ``cls``.

    Raises:
        ValueError: if it is not imported, or nothing that a checkpoint may build.
    """
    path = content.get(_KEY, {}).get("class_path")
    if path is None:
        return cls
    kind = recipes.find_class(path, LightningModule)
    return kind if issubclass(kind, cls) else cls


def rebuild(
    content: dict[str, Any], kind: type[LightningModule], given: dict[str, Any], path: Any
) -> tuple[dict[str, Any], dict[str, str]]:
    """Build the arguments of a module that are not given.

    Returns:
        The arguments, and for each optional one that the checkpoint could not store the reason.

    Raises:
        TypeError: if one that is needed is neither given nor stored.
        ValueError: if the checkpoint names a class that it may not, or that is not imported.
    """
    parameters = recipes.accepted(kind)
    arguments: dict[str, Any] = {}
    forgotten: dict[str, str] = {}
    stored = content.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
    missing = dict(content.get(_KEY, {}).get("missing", {}))
    for name, parameter in parameters.items():
        if name in given:
            continue
        if name in stored:
            try:
                arguments[name] = recipes.build(stored[name])
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"cannot build the {name} of {path}: {error}; or pass it: "
                    f"{kind.__name__}.load_from_checkpoint(path, {name}=...)"
                ) from error
        elif parameter.default is not parameter.empty:
            forgotten |= {name: missing[name]} if name in missing else {}
        else:
            reason = missing.get(name, "the checkpoint does not mention it")
            raise TypeError(
                f"{path} does not say how to build {name} ({reason}); build it as it was and pass it: "
                f"{kind.__name__}.load_from_checkpoint(path, {name}=...)"
            )
    return arguments, forgotten
