"""A loader that can resume in the middle of an epoch, and the state of all random number generators.

Lightning saves and restores a loader's state with each checkpoint (`state_dict`, `load_state_dict`). A resumed fit gets
the same batches and draws the same random numbers as an uninterrupted one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from freemerge.data.errors import reraise_data_errors


def random_state() -> dict[str, Any]:
    """The state of the global random number generators of Python, NumPy and torch.

    Returns:
        Tensors and plain values, for `set_random_state`; a checkpoint can hold them without pickled classes.
    """
    version, words, gauss = random.getstate()
    state: Any = np.random.get_state()  # noqa: NPY002 - users' code may draw from the global generator
    name, keys, position, has_gauss, cached = state
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        # The current device only: asking for the state of another device would allocate memory there.
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the global random number generators.

    Args:
        state: the result of `random_state`.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0].cpu())


class ResumableLoader(DataLoader):
    """A DataLoader that can resume in the middle of an epoch.

    Its workers must not be persistent. Workers that start in each epoch are seeded from that epoch, so a resumed fit
    can seed them alike. Persistent workers carry their generators from epoch to epoch, and torch does not expose their
    state. The restart costs about half a second per epoch with four forked workers on two cores.

    This class is small enough not to depend on torchdata for its `StatefulDataLoader`.
    """

    _start: dict[str, Any] | None = None
    _taken = 0
    _resume: dict[str, Any] | None = None

    # The base class returns torch's own iterator class; callers use it as an iterator only.
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Nothing runs until the first batch is requested: by then Lightning has set the epoch, and a checkpoint's state
        # has been loaded.
        return reraise_data_errors(self._batches(super().__iter__))

    def _batches(self, start: Any) -> Iterator[Any]:
        resume, self._resume = self._resume, None
        if resume is not None:
            set_random_state(resume["start"])
        self._start, self._taken = random_state(), 0
        batches = start()  # draws the base seed of the workers
        if resume is not None:
            # The batches are fetched and dropped, to advance the generators of workers and datasets.
            for _ in range(resume["taken"]):
                next(batches)
                self._taken += 1
            set_random_state(resume["now"])
        for batch in batches:
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position in the current epoch.

        Returns:
            The number of batches taken, and the state of the random generators at the epoch's start and now.
        """
        now = random_state()
        return {"taken": self._taken, "start": self._start or now, "now": now}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass resume at a position.

        Args:
            state: the result of `state_dict`.
        """
        self._resume = state


class EvaluationLoader(DataLoader):
    """A DataLoader that reports a worker's DataError in one line."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override] # see `ResumableLoader`
        return reraise_data_errors(super().__iter__())
