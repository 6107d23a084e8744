"""Task vectors: what fine-tuning added to a base, τ = θ_ft − θ_base.

- The algebra in memory: `task_vector`, `apply_task_vector`, `merge_task_vectors`.
- `Vectors`: the task vectors of K models seen tensor by tensor or chunk by chunk, as often as a method needs.

Notation: K models, D merged parameters in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from freemerge.errors import MergeError
from freemerge.runtime.processes import Processes
from freemerge.runtime.reading import keep_files_open
from freemerge.runtime.threads import each, run
from freemerge.tensors.chunks import CHUNK, Chunk, chunks, read_ahead
from freemerge.tensors.differences import blocks, flat
from freemerge.tensors.order_statistics import Scan

_Value = TypeVar("_Value")

_SAMPLE_RUNS = 1024
_SAMPLE_RUN = 128  # values per sampled chunk: neighbours are cheap to read, but correlated
_RUNS_OF_TENSOR, _RUN_OF_TENSOR = 32, 1024  # reading a chunk costs as much as many values
_UNSAMPLED = 1 << 18  # tensors of at most this size are sampled completely


class Vectors:
    """The task vectors of K models, one tensor or one chunk at a time; every iteration reads the models again.

    Args:
        labels: the names of the K models.
        shapes: name → shape of each merged tensor, in the order of iteration.
        read: returns the task vectors of one tensor, (K, *shape) float32, in new memory. Called in a thread.
        read_chunk: returns those of a chunk, (K, n) float32, in memory that the same thread's next call may reuse; by
            default the tensor is read and split.
        processes: the processes that share the passes; None for only this one.
        chunk: upper bound of K × the length of a chunk; None for the default.
        read_base: returns the base's values of a tensor, as stored; None if only the differences are known.
    """

    def __init__(
        self,
        labels: Sequence[str],
        shapes: Mapping[str, Sequence[int]],
        read: Callable[[str], Tensor],
        read_chunk: Callable[[Chunk], Tensor] | None = None,
        processes: Processes | None = None,
        chunk: int | None = None,
        read_base: Callable[[str], Tensor] | None = None,
    ) -> None:
        self.labels = tuple(labels)
        self.shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        self._read = read
        self._read_chunk = read_chunk
        self._processes = processes or Processes()
        self._chunk = chunk
        self._read_base = read_base
        self.names = tuple(self.shapes)
        """The names of the whole model's merged tensors, also where these are a `subset`."""

    @property
    def numel(self) -> int:
        """D, the number of merged parameters of one model."""
        return sum(shape.numel() for shape in self.shapes.values())

    def read(self, name: str) -> Tensor:
        """The task vectors of one tensor, (K, *shape) float32."""
        return self._read(name)

    def read_base(self, name: str) -> Tensor:
        """The base's values of one tensor, (*shape) as stored, for methods that look at the weights themselves.

        Raises:
            MergeError: only the differences to a base are known.
        """
        if self._read_base is None:
            raise MergeError(f"'{name}': this method needs the weights themselves, and only task vectors are there")
        return self._read_base(name)

    def read_chunk(self, chunk: Chunk) -> Tensor:
        """The task vectors of a chunk of a tensor's values, (K, n) float32."""
        if self._read_chunk is None:
            return flat(self._read(chunk.name))[:, chunk.start : chunk.stop]
        return self._read_chunk(chunk)

    def scan(self, see: Callable[[Tensor], None]) -> None:
        """Make one pass over all entries, with all threads; each process scans its part.

        Args:
            see: called with every chunk, (K, n) float32, in any order and from several threads at once. It may
                overwrite the chunk but must not keep it, because its memory is reused. What it collects must not depend
                on the order; see `gather`.
        """
        shapes = {name: self.shapes[name] for name in self._processes.share(self.shapes)}

        def look(name: str) -> None:  # a function, so that no tensor is held while the next one is read
            each(see, blocks(flat(self._read(name))))

        def work(jobs: Iterator[str | Chunk]) -> None:
            for job in jobs:
                if isinstance(job, Chunk):
                    see(self.read_chunk(job))
                else:
                    look(job)

        def scan() -> None:
            if self._read_chunk is not None:
                run(work, chunks(shapes, len(self.labels), self._chunk))
            else:
                self._run_over(work, list(shapes))

        self._processes.together(scan)

    def gather(self, value: _Value) -> list[_Value]:
        """Collect the result of each process's part of a scan, by rank; every process gets all results."""
        return self._processes.gather(value)

    def by_tensor(self, measure: Callable[[int, Scan, Tensor], _Value]) -> dict[str, _Value]:
        """Compute a statistic of each tensor, each in one thread of one process.

        Args:
            measure: called with the number of values n that each model has in the tensor, a function that makes a pass
                over them, and a sample of them, (K, m) with m ≤ n, which may be empty. A pass calls its argument with
                chunks, (K, ≤ n) float32, which the argument may overwrite but must not keep.

        Returns:
            Name → the statistic, in every process.
        """
        found: dict[str, _Value] = {}

        def parts(name: str) -> Iterator[Tensor]:
            if self._read_chunk is None:
                return iter(blocks(flat(self._read(name))))
            return map(self._read_chunk, chunks({name: self.shapes[name]}, len(self.labels), self._chunk))

        def work(names: Iterator[str]) -> None:
            for name in names:

                def scan(see: Callable[[Tensor], None], name: str = name) -> None:
                    for block in parts(name):
                        see(block)

                size = self.shapes[name].numel()
                runs = _RUNS_OF_TENSOR if size > _UNSAMPLED else 0
                found[name] = measure(size, scan, self._sample({name: self.shapes[name]}, runs, _RUN_OF_TENSOR))

        self._processes.together(lambda: self._run_over(work, self._processes.share(self.shapes)))
        return self._gathered(found)

    def map(self, function: Callable[[str, Tensor], _Value]) -> dict[str, _Value]:
        """Apply a function to each whole tensor, each in one thread of one process.

        Args:
            function: called with the name and (K, *shape) float32, which it may overwrite.

        Returns:
            Name → the result, in every process.
        """
        found: dict[str, _Value] = {}

        def work(names: Iterator[str]) -> None:
            for name in names:
                found[name] = function(name, self._read(name))

        self._processes.together(lambda: self._run_over_whole(work, self._processes.share(self.shapes)))
        return self._gathered(found)

    def _gathered(self, found: dict[str, _Value]) -> dict[str, _Value]:
        """Merge the results of all processes, by tensor."""
        everything = {name: value for part in self._processes.gather(found) for name, value in part.items()}
        return {name: everything[name] for name in self.shapes}

    def _run_over(self, work: Callable[[Iterator[str]], None], names: Sequence[str]) -> None:
        """Run jobs on tensors, read in chunks where possible."""
        if self._read_chunk is None:
            self._run_over_whole(work, names)
        else:
            run(work, names, returned=5 * CHUNK)  # brackets live longer than chunks, and would fragment the heap

    def _run_over_whole(self, work: Callable[[Iterator[str]], None], names: Sequence[str]) -> None:
        """Run jobs on whole tensors, only as many at a time as memory allows."""
        copies = len(self.labels) + 4  # the tensor that is read, and a filter's temporaries
        sizes = {name: copies * self.shapes[name].numel() for name in names}
        run(work, names, cost=sizes.__getitem__, budget=max(sizes.values(), default=0))

    def chunks(self) -> Iterator[Tensor]:
        """All values in chunks of bounded size: (K, n) float32, in the order of the tensors.

        For statistics that depend on the order; `scan` is faster for all others.
        """
        if self._read_chunk is None:
            return (flat(deltas) for _, deltas in self)
        return read_ahead(self._read_chunk, chunks(self.shapes, len(self.labels), self._chunk))

    def sample(self) -> Tensor:
        """A sample of the entries, the same for all models: (K, n) float32, with n about 2¹⁷ to 2¹⁸.

        It consists of short chunks at seeded positions, one in each of equal parts of the model, so that every tensor
        is represented according to its size. The same call gives the same sample. It is empty if tensors can only be
        read whole.
        """
        if self._read_chunk is None:
            return torch.zeros(len(self.labels), 0)
        if self.numel <= _SAMPLE_RUNS * _SAMPLE_RUN:
            return torch.cat(list(self.chunks()) or [torch.zeros(len(self.labels), 0)], dim=1)
        runs = min(_SAMPLE_RUNS << 1, max(_SAMPLE_RUNS, self.numel >> 17))
        return self._sample(self.shapes, runs, _SAMPLE_RUN)

    def _sample(self, shapes: Mapping[str, torch.Size], runs: int, length: int) -> Tensor:
        """Read `count` chunks of this length, (K, n) float32; none if tensors can only be read whole."""
        if self._read_chunk is None or not runs:
            return torch.zeros(len(self.labels), 0)
        share = sum(shape.numel() for shape in shapes.values()) / runs
        offsets = torch.rand(runs, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        starts = ((torch.arange(runs) + offsets) * share).long().tolist()
        found, position, index = [], 0, 0
        with keep_files_open():
            for name, shape in shapes.items():
                total = shape.numel()
                while index < runs and starts[index] < position + total:
                    start = starts[index] - position
                    found.append(self._read_chunk(Chunk(name, start, min(start + length, total))).clone())
                    index += 1
                position += total
        return torch.cat(found, dim=1)

    def subset(self, names: Iterable[str]) -> Vectors:
        """The task vectors of a selection of the tensors."""
        return self._changed({name: self.shapes[name] for name in names}, self._read, self._read_chunk)

    def regrouped(self, shapes: Mapping[str, Sequence[int]], read: Callable[[str], Tensor]) -> Vectors:
        """Task vectors of other tensors, computed from these.

        Args:
            shapes: name → shape.
            read: returns the tensor that `map` passes on, in new memory.
        """
        shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        return Vectors(self.labels, shapes, read, None, self._processes, self._chunk)

    def through(
        self, change: Callable[[str, Tensor], Tensor], change_chunk: Callable[[Chunk, Tensor], Tensor] | None = None
    ) -> Vectors:
        """The vectors after a change that depends only on the tensor.

        Args:
            change: (name, (K, *shape) float32) → the same, perhaps in place.
            change_chunk: (chunk, (K, n) float32) → the same; None if only whole tensors can be changed.
        """

        def read(name: str) -> Tensor:
            return change(name, self._read(name))

        if self._read_chunk is None or change_chunk is None:
            return self._changed(self.shapes, read, None)
        read_before, change_run = self._read_chunk, change_chunk

        def read_chunk(chunk: Chunk) -> Tensor:
            return change_run(chunk, read_before(chunk))

        return self._changed(self.shapes, read, read_chunk)

    def _changed(
        self,
        shapes: Mapping[str, Sequence[int]],
        read: Callable[[str], Tensor],
        read_chunk: Callable[[Chunk], Tensor] | None,
    ) -> Vectors:
        changed = Vectors(self.labels, shapes, read, read_chunk, self._processes, self._chunk, self._read_base)
        changed.names = self.names
        return changed

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return read_ahead(lambda name: (name, self._read(name)), self.shapes, depth=1)

    def __len__(self) -> int:
        return len(self.shapes)
