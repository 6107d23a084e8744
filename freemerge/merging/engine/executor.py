"""The work of a merge: every tensor of the result is computed once and handed to where it belongs.

- Elementwise methods see chunks that fit into the processor's cache, one in each thread.
- Other methods see whole tensors, as many at a time as a fixed number of copies of the largest one allows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from freemerge.checkpoints import TensorSpec
from freemerge.errors import MergeError
from freemerge.merging.engine.plan import Operands, Plan
from freemerge.merging.methods.base import MergeMethod
from freemerge.merging.task_vectors import Vectors, add_wide, working_dtype
from freemerge.runtime.pages import Pool, fresh
from freemerge.runtime.processes import Processes
from freemerge.runtime.threads import run
from freemerge.tensors.chunks import CHUNK, Chunk, chunks
from freemerge.tensors.rounding import round_to, to_stored

MERGED_BY_CHUNKS = 8  # float32 copies of a chunk of all models that a thread has at a time, about
_RUN = 1 << 17  # values of a whole tensor that are rounded and written at a time
_REPORTED = 1 << 24  # bytes read between two reports


def copies_of_largest(method: MergeMethod, models: int) -> int:
    """How many float32 copies of the largest tensor a merge may hold at a time; 0 if none is ever whole in memory.

    Args:
        method: how to merge.
        models: K.
    """
    return models + 5 if not method.elementwise or method.finishes else 0


class Sink(Protocol):
    """Where the values of a result go."""

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Take a run of a tensor's values; from any thread."""


class Memory(dict[str, Tensor]):
    """A result in memory: name → tensor.

    Args:
        specs: shape and dtype of every tensor.
    """

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        super().__init__()
        self._specs = specs
        self._lock = threading.Lock()

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Take a run of a tensor's values; the first decides where the tensor lives."""
        with self._lock:
            if name not in self:
                shape, dtype = self._specs[name]
                self[name] = fresh(shape, dtype, values.device)
        self[name].view(-1)[start : start + values.numel()] = values.reshape(-1)


class Meter:
    """Counts the bytes that a merge reads, and reports them.

    Args:
        plan: the merge.
        method: its method, which knows how many passes it makes.
        report: called with the bytes read so far and in all; None for nobody.
        processes: how many share the reading.
    """

    def __init__(
        self, plan: Plan, method: MergeMethod, report: Callable[[int, int], None] | None = None, processes: int = 1
    ) -> None:
        self._plan = plan
        self._report = report
        self._lock = threading.Lock()
        self.total = method.passes * sum(map(self._bytes, plan.merged)) // processes
        self._done = self._reported = 0

    def vectors(self, processes: Processes, averaged: bool = False) -> Vectors:
        """The models' task vectors, whose reading counts; see `Plan.vectors`."""
        vectors = self._plan.vectors(processes, averaged)
        if self._report is None:
            return vectors

        def count(what: str | Chunk, deltas: Tensor) -> Tensor:
            self.count(what)
            return deltas

        return vectors.through(count, count)

    def count(self, what: str | Chunk) -> None:
        """A tensor, or a chunk of one, was read of all models."""
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


class Merging:
    """Merges tensors of a plan.

    Args:
        plan: the merge.
        method: its method.
        statistics: what the method's survey returned.
        sink: where the result goes.
        meter: counts what is read.
    """

    def __init__(self, plan: Plan, method: MergeMethod, statistics: Any, sink: Sink, meter: Meter) -> None:
        self._plan = plan
        self._method = method
        self._statistics = statistics
        self._sink = sink
        self._meter = meter
        self._shapes = {name: torch.Size(spec.shape) for name, spec in plan.specs.items()}
        self._merged = set(plan.merged)
        self._averaged = plan.averaged
        # With one model the sum is the model's own vector, which is better seen as a whole (see `_merge`).
        self._finishes = method.finishes and len(plan.models) > 1
        self._whole = copies_of_largest(method, len(plan.models)) > 0
        self._kept = set(plan.kept)
        self._pool = Pool(0)
        self._copies = 5 if self._finishes else len(plan.models) + 4

    def run(self, names: Sequence[str]) -> None:
        """Merge tensors, by all threads.

        Args:
            names: of the result, none of them tied to another.

        Raises:
            MergeError: a value is NaN or infinite, or a method returns another shape than it should.
        """
        largest = max((self._shapes[name].numel() for name in names if self._takes_whole(name)), default=0)
        budget = copies_of_largest(self._method, len(self._plan.models)) * largest
        self._pool = Pool(4 * len(self._plan.models) * largest)
        # What finishes works on chunks as well, so their memory is to be used again, and whole tensors' is not.
        returned = 5 * CHUNK if largest and self._finishes else None
        run(self._work, self._jobs(names), cost=self._cost if largest else None, budget=budget, returned=returned)

    def _takes_whole(self, name: str) -> bool:
        return self._whole and name in self._merged and name not in self._averaged

    def _jobs(self, names: Sequence[str]) -> Iterator[str | Chunk]:
        for name in names:
            if self._takes_whole(name) or self._shapes[name].numel() == 0:
                yield name
            else:
                yield from self._chunks(name)

    def _chunks(self, name: str) -> Iterator[Chunk]:
        return chunks({name: self._shapes[name]}, len(self._plan.models), self._plan.chunk)

    def _cost(self, job: str | Chunk) -> int:
        return 0 if isinstance(job, Chunk) else self._copies * self._shapes[job].numel()

    def _work(self, jobs: Iterator[str | Chunk]) -> None:
        for job in jobs:
            name = job.name if isinstance(job, Chunk) else job
            if name in self._kept:
                self._keep(job)
            elif self._finishes and not isinstance(job, Chunk) and self._shapes[name].numel():
                self._merge_by_chunks(name)
            elif isinstance(job, Chunk):
                self._merge(name, self._plan.read_again(job))
            else:
                self._merge_whole(name)
            if name in self._merged:
                self._meter.count(job)

    def _keep(self, what: str | Chunk) -> None:
        """Copy the base's values."""
        name, start = (what.name, what.start) if isinstance(what, Chunk) else (what, 0)
        values, dtype = self._plan.read_base(what), self._plan.output_dtype(name)
        if dtype != values.dtype:
            values = round_to(values.to(working_dtype(values.dtype)), dtype, name)
        self._hand_on(name, start, values)

    def _merge_by_chunks(self, name: str) -> None:
        """Merge a tensor by chunks that are finished as a whole: no more than the sum is ever whole in memory."""
        shape = self._shapes[name]
        with self._lent(shape.numel()) as memory:
            merged = memory[: shape.numel()]
            for chunk in self._chunks(name):
                operands = self._plan.read_again(chunk)
                part = self._combine(name, chunk.start, operands.deltas, operands.base.shape)
                merged[chunk.start : chunk.stop] = part
            merged = self._checked(name, self._method.finish(name, merged.view(shape)), shape).reshape(-1)
            for chunk in self._chunks(name):
                base = self._plan.read_base(chunk)
                self._put(name, chunk.start, add_wide(base, merged[chunk.start : chunk.stop]))

    def _merge_whole(self, name: str) -> None:
        """Merge a tensor that the method has to see whole."""
        with self._lent(len(self._plan.models) * self._shapes[name].numel()) as memory:
            self._merge(name, self._plan.read(name, memory))

    @contextmanager
    def _lent(self, values: int) -> Iterator[Tensor]:
        """Memory for at least so many values, (n,) float32 with arbitrary contents; torch pools a GPU's own."""
        if self._plan.place.type != "cpu":
            yield fresh((values,), torch.float32, self._plan.place)
            return
        memory = self._pool.take(4 * values)
        try:
            yield memory.view(torch.float32)
        finally:
            self._pool.give(memory)

    def _merge(self, name: str, operands: Operands) -> None:
        """Merge a tensor or a chunk of one."""
        base, deltas, single, start = operands
        del operands
        if single is None:
            shape, on_cpu = base.shape, base.device.type == "cpu"
            again = start is None and on_cpu and shape.numel() > _RUN  # a whole tensor is rather read twice than kept
            if again:
                del base
            merged = self._combine(name, start, deltas, shape).reshape(-1)
            del deltas  # K tensors, perhaps
            step = _RUN if on_cpu else max(1, len(merged))
            for first in range(0, max(1, len(merged)), step):  # neither sums nor rounded values are ever whole
                stop = min(first + step, len(merged))
                own = self._plan.read_base(Chunk(name, first, stop)) if again else base.reshape(-1)[first:stop]
                self._put(name, (start or 0) + first, add_wide(own, merged[first:stop]))
            return
        before = deltas[0].clone()  # a method may overwrite what it is given
        merged = self._combine(name, start, deltas, base.shape)
        # Where a single model's entry comes through unchanged, base + (model − base) is meant to be the model's own
        # value, and in floating point it is not always.
        result = add_wide(base, merged)
        self._put(name, start, torch.where(merged == before, single.to(result.device, result.dtype), result))

    def _combine(self, name: str, start: int | None, deltas: Tensor, shape: torch.Size) -> Tensor:
        if name in self._averaged:
            return deltas.mean(dim=0)
        if start is None:
            return self._checked(name, self._method.combine(name, deltas, self._statistics), shape)
        return self._checked(name, self._method.combine_chunk(name, start, deltas, self._statistics), shape)

    def _checked(self, name: str, merged: Tensor, shape: torch.Size) -> Tensor:
        if merged.shape != shape:
            raise MergeError(
                f"{type(self._method).__name__}.combine returned shape {list(merged.shape)} for the tensor '{name}', "
                f"expected {list(shape)}"
            )
        return merged

    def _put(self, name: str, start: int | None, result: Tensor) -> None:
        """Round what is merged, (*shape) or (n,) float32 or float64, and hand it on if it is finite."""
        self._hand_on(name, start or 0, to_stored(result, self._plan.output_dtype(name), name, self._method))

    def _hand_on(self, name: str, start: int, values: Tensor) -> None:
        self._sink.write(name, start, self._plan.returned(values))
