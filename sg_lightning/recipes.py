"""Objects as plain data and back, so that a checkpoint says how to build what it holds.

A recipe is ``{"class_path": "sg_lightning.neurons.LIF", "init_args": {"beta": 0.9}}``, the form of LightningCLI's
configs; arguments are plain values, tensors, tuples, lists and dicts of them, and recipes.

The rule for reading one, so that a checkpoint cannot run code of its own: a recipe names classes only, no functions;
the class must be :class:`Storable`, which this library, torch's optimisers and schedulers, and what a program registers
itself are; and its module must have been imported already. Nothing is imported for a recipe.
"""

from __future__ import annotations

import inspect
import sys
from abc import ABC
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from pathlib import PurePath
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import Self  # typing has it from Python 3.11

Recipe: TypeAlias = dict[str, Any]


class NotStorable(TypeError):
    """A value has no recipe; the message says why."""


class Storable(ABC):  # noqa: B024 - others become it by registration
    """Virtual base of the classes that a checkpoint may name.

    ``@Storable.register`` adds a class and its subclasses. An object's recipe holds the attributes that are called like
    the arguments of its constructor, as in a dataclass, unless the class is :class:`Recorded`.
    """


Storable.register(Optimizer)
Storable.register(LRScheduler)


@dataclass(frozen=True)
class Missing:
    """Stands for an argument that has no recipe."""

    reason: str


@Storable.register
class Recorded:
    """Base of modules that keep the arguments they are built with, as plain data.

    ``*args`` and ``**kwargs`` of a constructor are taken to go to the next one unchanged.
    """

    _recorded: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:  # noqa: D102
        self = super().__new__(cls)
        # Before __init__ a torch module cannot set attributes in its own way.
        object.__setattr__(self, "_recorded", _record(cls, args, kwargs))
        return self

    def arguments(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the arguments that have a recipe, and for each of the others why not."""
        kept = {name: value for name, value in self._recorded.items() if not isinstance(value, Missing)}
        return kept, {name: value.reason for name, value in self._recorded.items() if isinstance(value, Missing)}


def _record(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    recorded: dict[str, Any] = {}
    for depth, parameters in enumerate(_constructors(cls)):
        named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        given = {p.name: value for p, value in zip(named, args, strict=False)}
        args = args[len(named) :]
        given |= {p.name: kwargs[p.name] for p in parameters if p.name in kwargs}
        kwargs = {name: value for name, value in kwargs.items() if name not in given}
        for p in parameters:
            # A default is stored too, since it may change; one behind **kwargs may be set by the class in between.
            default = p.default if depth == 0 else p.empty
            value = given.get(p.name, default)
            if value is p.empty:
                continue
            try:
                recorded[p.name] = describe(value)
            except NotStorable as error:
                if value is not p.default:
                    recorded[p.name] = Missing(str(error))
    if args:
        recorded["*"] = Missing("arguments without a name cannot be stored")
    return recorded


def _constructors(cls: type) -> Iterator[list[inspect.Parameter]]:
    """Yield the parameters of a constructor, then of those that its ``*args`` or ``**kwargs`` go to."""
    for kind in cls.__mro__:
        init = vars(kind).get("__init__")
        if init is None or kind is object:
            continue
        _, *parameters = inspect.signature(init).parameters.values()
        open_ended = [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        yield [p for p in parameters if p not in open_ended]
        if not open_ended:
            return


def accepted(cls: type) -> dict[str, inspect.Parameter]:
    """Return the named parameters of a constructor, those behind ``**kwargs`` included."""
    found: dict[str, inspect.Parameter] = {}
    for parameters in _constructors(cls):
        for p in parameters:
            found.setdefault(p.name, p)
    return found


def describe(value: Any) -> Any:
    """Return a value as plain data, objects as recipes.

    Raises:
        NotStorable: if it, or something in it, has none.
    """
    if value is None or isinstance(value, bool):
        return value
    plain: tuple[tuple[type, Callable[..., Any]], ...] = ((str, str), (PurePath, str), (Integral, int), (Real, float))
    for kind, convert in plain:
        if isinstance(value, kind):
            return convert(value)  # numpy's scalars are no plain values
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple | list):
        return (tuple if isinstance(value, tuple) else list)(describe(item) for item in value)
    if isinstance(value, Mapping):
        return {describe(key): describe(item) for key, item in value.items()}
    made = _optimiser_maker(value)
    if made is not None:
        return made
    if not isinstance(value, Storable):
        what = getattr(value, "__name__", None) or f"a {type(value).__name__}"
        raise NotStorable(f"{what} is nothing that a checkpoint can store")
    return recipe(value)


def recipe(value: Any) -> Recipe:
    """Return the recipe of an object.

    Raises:
        NotStorable: naming the argument that has none.
    """
    kind = type(value)
    path = class_path(kind)
    if isinstance(value, Recorded):
        arguments, missing = value.arguments()
        for name, reason in missing.items():
            raise NotStorable(f"{name} of {kind.__name__}: {reason}")
        return {"class_path": path, "init_args": arguments}
    arguments = {}
    for name in inspect.signature(kind).parameters:
        if not hasattr(value, name):
            raise NotStorable(f"{kind.__name__} does not keep its argument {name}")
        try:
            arguments[name] = describe(getattr(value, name))
        except NotStorable as error:
            raise NotStorable(f"{name} of {kind.__name__}: {error}") from error
    return {"class_path": path, "init_args": arguments}


def _optimiser_maker(value: Any) -> Recipe | None:
    """Describe an optimiser or scheduler class, or a partial of one; ``None`` for anything else."""
    kind, keywords = value, {}
    if isinstance(value, partial):
        keywords = value.keywords
        # LightningCLI's partials call jsonargparse, with the class as an argument.
        ours = str(getattr(value.func, "__module__", "")).partition(".")[0] == "jsonargparse"
        classes = [arg for arg in value.args if inspect.isclass(arg)] if ours else [value.func, *value.args]
        kind = classes[0] if len(classes) == 1 else None
    if not inspect.isclass(kind) or not issubclass(kind, Optimizer | LRScheduler):
        return None
    return {"class_path": class_path(kind), "init_args": describe(keywords)}


def class_path(kind: type) -> str:
    """Return the shortest path under which a class can be found again: where it is public.

    Raises:
        NotStorable: if it cannot be found, because it is defined inside a function.
    """
    parts = kind.__module__.split(".")
    for length in range(1, len(parts) + 1):
        path = ".".join([*parts[:length], kind.__qualname__])
        if look_up(path) is kind:
            return path
    raise NotStorable(f"{kind.__name__} is defined inside a function, where no checkpoint finds it")


def look_up(path: str) -> Any:
    """Return what is at a path in the modules imported so far; ``None`` if nothing is."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:length]))
        if found is None:
            continue
        for name in parts[length:]:
            found = getattr(found, name, None)
        return found
    return None


def find_class(path: Any, base: type = Storable) -> type:
    """Return the class at a path, by the rule above.

    Raises:
        ValueError: if the rule forbids it, or it is not a ``base``.
    """
    found = look_up(path) if isinstance(path, str) else None
    if found is None:
        raise ValueError(f"{path} is not imported, and nothing is imported on behalf of a checkpoint; import it first")
    if not inspect.isclass(found) or not issubclass(found, Storable) or not issubclass(found, base):
        raise ValueError(f"{path} is no class that a checkpoint may build; only a {base.__name__} class is")
    return found


def build(value: Any) -> Any:
    """Build what :func:`describe` has described; an optimiser or scheduler becomes a function that makes it.

    Raises:
        ValueError: on a class that the rule above forbids.
    """
    if isinstance(value, Mapping):
        if "class_path" not in value:
            return {key: build(item) for key, item in value.items()}
        kind: Callable[..., Any] = find_class(value["class_path"])
        arguments = {name: build(item) for name, item in value.get("init_args", {}).items()}
        if inspect.isclass(kind) and issubclass(kind, Optimizer | LRScheduler):
            return partial(kind, **arguments)
        return kind(**arguments)
    if isinstance(value, tuple | list):
        return type(value)(build(item) for item in value)
    return value.clone() if isinstance(value, torch.Tensor) else value
