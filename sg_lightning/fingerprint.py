"""Hashes that tell whether a model or a sample is the same as before. A leaf that every room may import."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from sg_lightning.inputs import Input, tensors


def fingerprint_model(model: Any) -> str:
    """Hash parameters and buffers (12 hex digits); a plain function is named instead."""
    if not isinstance(model, nn.Module):
        return f"function {getattr(model, '__qualname__', type(model).__name__)}"
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(name.encode() + str(value.dtype).encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def fingerprint_samples(x: Input, y: Tensor) -> list[str]:
    """Hash input and label of every sample (8 hex digits each)."""
    parts = [part.detach().cpu().contiguous() for part in [*tensors(x), y]]
    blobs = [part.view(len(y), -1).view(torch.uint8).numpy() for part in parts]
    return [
        hashlib.blake2b(b"".join(blob[k].tobytes() for blob in blobs), digest_size=4).hexdigest() for k in range(len(y))
    ]
