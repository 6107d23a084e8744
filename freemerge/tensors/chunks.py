"""Prefetching, and splitting models into chunks of bounded size."""

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
# threads wait for the GIL more than for memory; larger ones only take memory. With many models a chunk has at least
# _SHORTEST values of each, because each is a separate read.
CHUNK = 1 << 20
_SHORTEST = 1 << 16
# 64 MiB in float32: long compared with the launch of a copy or kernel, small compared with GPU memory
_ON_DEVICE = 1 << 24


class Chunk(NamedTuple):
    """A contiguous part of a tensor's values in row-major order."""

    name: str
    start: int
    stop: int


def chunks(shapes: Mapping[str, torch.Size], models: int, size: int | None = None) -> Iterator[Chunk]:
    """Split tensors into chunks of at most `size` values over all models.

    Args:
        shapes: name → shape.
        models: K, the number of models whose values are read together.
        size: upper bound of K × the length of a chunk; `CHUNK` if None, but then chunks of many models are not made too
            short.
    """
    step = max((size or CHUNK) // max(models, 1), 1 if size else _SHORTEST)
    for name, shape in shapes.items():
        total = shape.numel()
        for start in range(0, total, step):
            yield Chunk(name, start, min(start + step, total))
            relieve()


def at_a_time(values: int, device: torch.device, models: int = 1) -> int:
    """The number of values of each model to process at a time.

    Args:
        values: the number that suits a CPU's cache. A GPU gets more, because each kernel launch is costly.
        device: the device of the values.
        models: K, the number of models whose values are processed together.
    """
    return values if device.type == "cpu" else max(values, _ON_DEVICE // max(models, 1))


def read_ahead(read: Callable[[_Job], _Result], jobs: Iterable[_Job], depth: int = 2) -> Iterator[_Result]:
    """Yield the results of `read` in the order of the jobs, while a thread reads the next ones.

    Args:
        read: called in the thread for one job at a time.
        jobs: the arguments of `read`.
        depth: how many finished results may wait. Together with the one in use and the one being read, this bounds the
            memory.
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
        finally:  # also when the generator is closed early: the thread must not wait for a consumer that is gone
            for future in pending:
                future.cancel()
