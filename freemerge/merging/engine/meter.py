"""The progress of a merge: bytes read so far, and in total."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from freemerge.merging.engine.reader import Reader
from freemerge.merging.methods.base import MergeMethod
from freemerge.merging.task_vectors import Vectors
from freemerge.runtime.processes import Processes
from freemerge.tensors.chunks import Chunk

_REPORTED = 1 << 24  # bytes read between two reports


class Meter:
    """Counts the bytes that a merge reads, and reports them.

    Args:
        reader: reads the tensors of the plan.
        method: the method, which states its number of passes.
        report: called with the bytes read so far and in total; None for no reports.
        processes: the number of processes that share the reading.
    """

    def __init__(
        self, reader: Reader, method: MergeMethod, report: Callable[[int, int], None] | None = None, processes: int = 1
    ) -> None:
        self._reader, self._plan = reader, reader.plan
        self._report = report
        self._lock = threading.Lock()
        self.total = method.passes * sum(map(self._bytes, self._plan.merged)) // processes
        self._done = self._reported = 0

    def vectors(self, processes: Processes) -> Vectors:
        """The models' task vectors, whose reading is counted; see `Reader.vectors`."""
        vectors = self._reader.vectors(processes)
        if self._report is None:
            return vectors

        def count(what: str | Chunk, deltas: Tensor) -> Tensor:
            self.count(what)
            return deltas

        return vectors.through(count, count)

    def count(self, what: str | Chunk) -> None:
        """Count a tensor, or a chunk of one, that was read from all models."""
        if self._report is None:
            return
        with self._lock:
            self._done += self._bytes(what)
            due = self._done - self._reported >= _REPORTED or self._done >= self.total
            self._reported = self._done if due else self._reported
            done = min(self._done, self.total)
        if due:
            self._report(done, self.total)

    def _bytes(self, what: str | Chunk) -> int:
        name, values = (what.name, what.stop - what.start) if isinstance(what, Chunk) else (what, None)
        models = [model for model in (self._plan.base, *self._plan.models) if model.has(name)]
        if values is None:
            values = torch.Size(self._plan.base.spec(name).shape).numel()
        return values * sum(model.spec(name).dtype.itemsize for model in models)
