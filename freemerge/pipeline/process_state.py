"""A run seeds the whole process for each fit; afterwards the caller's random state is restored."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.seed import isolate_rng

_SEEDS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")  # `seed_everything` stores the seed here for child processes


@contextmanager
def seeds_put_back() -> Iterator[None]:
    """Restore the random state, and the seed in the environment, at the end of the block."""
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
