"""A loader that goes on in the middle of an epoch, and the state of all random generators.

Lightning asks loaders for their state when it writes a checkpoint (`state_dict`, `load_state_dict`). A fit that goes on
from one gets the batches, and draws the random numbers, that it would have got without the stop.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from freemerge.data.errors import raised_here


def random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's global generators, as tensors and plain values."""
    version, words, gauss = random.getstate()
    state: Any = np.random.get_state()  # noqa: NPY002 - the global one is what is kept
    name, keys, position, has_gauss, cached = state
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        # This process's own device alone: to ask the others would take memory on each of them.
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go back to a state that `random_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0].cpu())


class ResumableLoader(DataLoader):
    """A DataLoader that knows how far it is, and can go on from there.

    Its workers must not be persistent: started anew in each epoch, they have seeds of that epoch, and a fit that goes
    on gets them too. Persistent ones carry their generators from epoch to epoch, and torch does not tell their state.
    Starting anew costs half a second per epoch with four forked workers on two cores.
    """

    _start: dict[str, Any] | None = None
    _taken = 0
    _resume: dict[str, Any] | None = None

    # torch declares its own iterator class; callers only ask it for batches.
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: nothing happens before the first batch is asked for, by when Lightning has told the epoch, and a
        # checkpoint has told where to go on.
        return raised_here(self._batches(super().__iter__))

    def _batches(self, start: Any) -> Iterator[Any]:
        resume, self._resume = self._resume, None
        if resume is not None:
            set_random_state(resume["start"])
        self._start, self._taken = random_state(), 0
        batches = start()  # draws the seed of the workers
        if resume is not None:
            # Fetched and dropped, so that workers and data that draw random numbers come to where they were.
            for _ in range(resume["taken"]):
                next(batches)
                self._taken += 1
            set_random_state(resume["now"])
        for batch in batches:
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """How many batches of this epoch have been taken, and the random generators, at its start and now."""
        now = random_state()
        return {"taken": self._taken, "start": self._start or now, "now": now}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass go on from there."""
        self._resume = state


class EvaluationLoader(DataLoader):
    """A DataLoader whose workers' errors about data are one line."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override] # see `ResumableLoader`
        return raised_here(super().__iter__())
