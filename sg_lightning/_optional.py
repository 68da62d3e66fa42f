"""Import an optional package where it is used, or say in one sentence how to get it."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import ``module``, or raise ``ImportError`` with the pip command.

    Args:
        module: Name to import, e.g. ``"matplotlib.pyplot"``.
        extra: Extra of sg-lightning that brings it, e.g. ``"report"``.
        purpose: What needs it, for the message.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(f"{purpose} needs {package}: pip install 'sg-lightning[{extra}]'") from error
