"""A run seeds the whole process for each of its fits; for a caller in Python the process is then as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.seed import isolate_rng

_SEEDS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")  # where `seed_everything` leaves the seed for processes to come


@contextmanager
def seeds_put_back() -> Iterator[None]:
    """Random numbers, and the seed in the environment, are afterwards as they were before."""
    before = {name: os.environ.get(name) for name in _SEEDS}
    with isolate_rng(include_cuda=torch.cuda.is_initialized()):
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
