"""Shared set-up: one thread (the machines of CI are small and shared), a fixed seed and the same environment per test."""

import os
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    # Runs on several processes leave LOCAL_RANK and MASTER_PORT behind, and a later one would wait for ranks that are not
    # started.
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
