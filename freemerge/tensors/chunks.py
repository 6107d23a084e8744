"""Reading ahead, and cutting models into chunks of bounded size."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch

from freemerge.runtime.heap import relieve

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")

# Values of all models together in one chunk: 4 MiB in float32. Smaller ones would stay in a core's own cache, but then
# threads wait for each other's turn in the interpreter more than for memory; larger ones only take memory. With many
# models a run is no shorter than _SHORTEST: each is a read.
CHUNK = 1 << 20
_SHORTEST = 1 << 16
_ON_DEVICE = 1 << 24  # 64 MiB in float32: long against the start of a copy or a kernel, and there is room for many


class Chunk(NamedTuple):
    """A run of a tensor's values in row-major order."""

    name: str
    start: int
    stop: int


def chunks(shapes: Mapping[str, torch.Size], models: int, size: int | None = None) -> Iterator[Chunk]:
    """Cut tensors into runs of at most `size` values over all models.

    Args:
        shapes: name → shape.
        models: K, the number of models whose values are read together.
        size: bound of K × the length of a run; `CHUNK` if None, but then runs of many models are not cut too short.
    """
    step = max((size or CHUNK) // max(models, 1), 1 if size else _SHORTEST)
    for name, shape in shapes.items():
        total = shape.numel()
        for start in range(0, total, step):
            yield Chunk(name, start, min(start + step, total))
            relieve()


def at_a_time(values: int, device: torch.device, models: int = 1) -> int:
    """How many values of each model to compute with at a time.

    Args:
        values: as many as suit a processor's cache; on a GPU each start costs as much as very many.
        device: where they are.
        models: K, whose values are computed with together.
    """
    return values if device.type == "cpu" else max(values, _ON_DEVICE // max(models, 1))


def read_ahead(read: Callable[[_Job], _Result], jobs: Iterable[_Job], depth: int = 2) -> Iterator[_Result]:
    """Results of `read` in the order of the jobs, the next ones already being read in a thread.

    Args:
        read: called in the thread, for one job at a time.
        jobs: what to read.
        depth: how many results may wait; with the one in use and the one being read it bounds the memory.
    """
    pending: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="freemerge-read") as pool:
        try:
            for job in jobs:
                pending.append(pool.submit(read, job))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # also when the reader is abandoned: nobody waits for what nobody wants
            for future in pending:
                future.cancel()
