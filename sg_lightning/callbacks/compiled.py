"""Make compiled networks work where one graph is run backward twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule
from torch import nn


@contextmanager
def kept_buffers(module: LightningModule) -> Iterator[None]:
    """Compile the networks of a module anew, so that a backward pass leaves the graph whole for another one.

    ``torch.compile`` lets the backward pass overwrite what the forward pass saved. The switch counts while a graph is
    compiled, so graphs from before would go on doing that, unnoticed: they are dropped. Does nothing where no
    network is compiled.
    """
    config = torch._functorch.config
    if not getattr(config, "donated_buffer", False) or not _is_compiled(module):
        yield
        return
    torch._dynamo.reset()
    config.donated_buffer = False
    try:
        yield
    finally:
        config.donated_buffer = True


def _is_compiled(module: LightningModule) -> bool:
    if getattr(module, "_compiler_ctx", None) is not None:  # the whole module was compiled, and Lightning unwrapped it
        return True
    return any(_compiled_call(part) for part in module.modules())


def _compiled_call(part: nn.Module) -> bool:
    wrapped = hasattr(part, "_orig_mod")  # torch.compile(net)
    return wrapped or getattr(part, "_compiled_call_impl", None) is not None  # net.compile()
