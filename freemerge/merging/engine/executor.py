"""The executor of all merges: computes every tensor of the result once and passes it to a sink.

Merges in memory, to files and in a search differ only in the reader and the sink.

- Elementwise methods get chunks that fit into the CPU's cache, one in each thread.
- Other methods get whole tensors, as many at a time as fit into the memory of a fixed number of copies of the largest
  one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from freemerge.checkpoints import TensorSpec
from freemerge.merging.engine.combiner import Combiner
from freemerge.merging.engine.meter import Meter
from freemerge.merging.engine.reader import Operands, Reader
from freemerge.merging.methods.base import MergeMethod
from freemerge.runtime.pages import Pool, fresh
from freemerge.runtime.threads import run
from freemerge.tensors.chunks import CHUNK, Chunk, chunks
from freemerge.tensors.differences import add_wide, working_dtype
from freemerge.tensors.rounding import round_to, to_stored

MERGED_BY_CHUNKS = 8  # approximate number of float32 copies of a chunk of all models in each thread
_RUN = 1 << 17  # values of a whole tensor rounded and written at a time


def copies_of_largest(method: MergeMethod, models: int) -> int:
    """The number of float32 copies of the largest tensor that a merge may hold; 0 if no tensor is ever whole in memory.

    Args:
        method: how to merge.
        models: K.
    """
    if method.elementwise and not method.finishes:
        return 0
    return models + 5 + method.extra_copies(models)


class Sink(Protocol):
    """The destination of a result's values."""

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Accept a chunk of a tensor's values; may be called from any thread."""


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
        """Accept a chunk of a tensor's values; the first chunk determines the tensor's device."""
        with self._lock:
            if name not in self:
                shape, dtype = self._specs[name]
                self[name] = fresh(shape, dtype, values.device)
        self[name].view(-1)[start : start + values.numel()] = values.reshape(-1)


class Executor:
    """Merges tensors of a plan.

    Args:
        reader: reads the tensors of the plan.
        combiner: the method with its statistics.
        sink: the destination of the result.
        meter: counts the bytes read; None for no count.
        onto_base: whether merged differences are added to the base and rounded to the result's dtype; otherwise the
            sink gets the float32 differences.
        advice: what messages suggest if values overflow the result's dtype; see `round_to`.
    """

    def __init__(
        self,
        reader: Reader,
        combiner: Combiner,
        sink: Sink,
        meter: Meter | None = None,
        *,
        onto_base: bool = True,
        advice: str | None = None,
    ) -> None:
        plan, method = reader.plan, combiner.method
        self._plan = plan
        self._reader = reader
        self._combiner = combiner
        self._sink = sink
        self._meter = meter
        self._onto_base = onto_base
        self._advice = advice
        self._shapes = {name: torch.Size(spec.shape) for name, spec in plan.specs.items()}
        self._merged = set(plan.merged)
        # With one model the sum is the model's own vector, which is better processed whole (see `_merge`).
        self._finishes = method.finishes and len(plan.models) > 1
        self._whole = copies_of_largest(method, len(plan.models)) > 0
        self._kept = set(plan.kept)
        self._pool = Pool(0)
        self._copies = 5 if self._finishes else copies_of_largest(method, len(plan.models)) - 1

    def run(self, names: Sequence[str]) -> None:
        """Merge tensors with all threads.

        Args:
            names: tensors of the result, none of them tied to another.

        Raises:
            MergeError: a value is NaN or infinite or overflows the result's dtype, or a method returns a wrong shape.
        """
        largest = max((self._shapes[name].numel() for name in names if self._takes_whole(name)), default=0)
        budget = copies_of_largest(self._combiner.method, len(self._plan.models)) * largest
        self._pool = Pool(4 * len(self._plan.models) * largest)
        # Finishing methods also work on chunks, whose memory is reused; memory of whole tensors is not.
        returned = 5 * CHUNK if largest and self._finishes else None
        run(self._work, self._jobs(names), cost=self._cost if largest else None, budget=budget, returned=returned)

    def _takes_whole(self, name: str) -> bool:
        return self._whole and name in self._merged and name not in self._plan.averaged

    def _jobs(self, names: Sequence[str]) -> Iterator[str | Chunk]:
        for name in names:
            if self._takes_whole(name) or self._shapes[name].numel() == 0:
                yield name
            else:
                yield from self._chunks(name)

    def _chunks(self, name: str) -> Iterator[Chunk]:
        return chunks({name: self._shapes[name]}, len(self._plan.models), self._reader.chunk)

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
                self._merge(name, self._reader.read_again(job))
            else:
                self._merge_whole(name)
            if name in self._merged and self._meter is not None:
                self._meter.count(job)

    def _keep(self, what: str | Chunk) -> None:
        """Copy the base's values."""
        name, start = (what.name, what.start) if isinstance(what, Chunk) else (what, 0)
        values, dtype = self._reader.read_base(what), self._plan.output_dtype(name)
        if dtype != values.dtype:
            values = round_to(values.to(working_dtype(values.dtype)), dtype, name, self._advice)
        self._hand_on(name, start, values)

    def _merge_by_chunks(self, name: str) -> None:
        """Merge a tensor in chunks and finish it as a whole: only the sum is ever whole in memory."""
        shape = self._shapes[name]
        with self._lent(shape.numel()) as memory:
            merged = memory[: shape.numel()]
            for chunk in self._chunks(name):
                operands = self._reader.read_again(chunk)
                merged[chunk.start : chunk.stop] = self._combiner.chunk(name, chunk.start, operands.deltas)
            merged = self._combiner.finish(name, merged.view(shape)).reshape(-1)
            for chunk in self._chunks(name):
                part = merged[chunk.start : chunk.stop]
                self._put(name, chunk.start, part, self._reader.read_base(chunk) if self._onto_base else None)

    def _merge_whole(self, name: str) -> None:
        """Merge a tensor that the method needs as a whole."""
        with self._lent(len(self._plan.models) * self._shapes[name].numel()) as memory:
            self._merge(name, self._reader.read(name, memory))

    @contextmanager
    def _lent(self, values: int) -> Iterator[Tensor]:
        """Memory for at least `size` values, (n,) float32 with arbitrary contents; torch's allocator pools a GPU's."""
        if self._reader.place.type != "cpu":
            yield fresh((values,), torch.float32, self._reader.place)
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
        if single is not None and self._onto_base:
            self._merge_single(name, base, deltas, single, start)
            return
        on_cpu, values = base.device.type == "cpu", base.numel()
        # reading a whole tensor twice takes less memory than keeping it
        again = start is None and on_cpu and values > _RUN
        if again or not self._onto_base:
            del base
        merged = self._combine(name, start, deltas).reshape(-1)
        del deltas  # may be K tensors
        step = _RUN if on_cpu else max(1, values)
        for first in range(0, max(1, values), step):  # sums and rounded values are never whole in memory
            stop = min(first + step, values)
            own = None
            if self._onto_base:
                own = self._reader.read_base(Chunk(name, first, stop)) if again else base.reshape(-1)[first:stop]
            self._put(name, (start or 0) + first, merged[first:stop], own)

    def _merge_single(self, name: str, base: Tensor, deltas: Tensor, single: Tensor, start: int | None) -> None:
        """Merge a single model: where an entry of its vector is unchanged, the result is the model's own value.

        In floating point, base + (model − base) does not always equal it.
        """
        before = deltas[0].clone()  # a method may overwrite its argument
        merged = self._combine(name, start, deltas)
        result = add_wide(base, merged)
        self._store(name, start or 0, torch.where(merged == before, single.to(result.device, result.dtype), result))

    def _combine(self, name: str, start: int | None, deltas: Tensor) -> Tensor:
        return self._combiner.whole(name, deltas) if start is None else self._combiner.chunk(name, start, deltas)

    def _put(self, name: str, start: int, merged: Tensor, base: Tensor | None) -> None:
        """Pass a chunk of merged differences, (n,) float32, to the sink: added to the base's values, or unchanged."""
        if base is None:
            self._hand_on(name, start, to_stored(merged, torch.float32, name, self._combiner.method))
        else:
            self._store(name, start, add_wide(base, merged))

    def _store(self, name: str, start: int, result: Tensor) -> None:
        """Round merged values, (*shape) or (n,) float32 or float64, and pass them to the sink if they are finite."""
        dtype, method = self._plan.output_dtype(name), self._combiner.method
        self._hand_on(name, start, to_stored(result, dtype, name, method, self._advice))

    def _hand_on(self, name: str, start: int, values: Tensor) -> None:
        self._sink.write(name, start, self._reader.returned(values))
