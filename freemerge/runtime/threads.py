"""Threads that process a stream of jobs in parallel.

Each thread runs single-threaded operations, so the work scales with the threads whatever its operations are, and no
result depends on the number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from freemerge.runtime.heap import REUSED, relieve, returning
from freemerge.runtime.pages import fresh
from freemerge.runtime.reading import keep_files_open

_Job = TypeVar("_Job")
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# In a worker thread: .size, the number of parallel workers; .scratch, its reusable memory.
_team = threading.local()

_loading = threading.Lock()
_loaded: set[torch.device] = set()

_WHOLE = 1 << 20  # while whole tensors are processed, larger blocks hold (parts of) whole tensors
_SCATTERED = 32 << 20  # bytes of fragmented free memory that are tolerated; a quarter of it for whole tensors


def team_size() -> int:
    """The number of worker threads: as many as torch would use (OMP_NUM_THREADS, `torch.set_num_threads`)."""
    return getattr(_team, "size", None) or torch.get_num_threads()


@contextmanager
def one_thread() -> Iterator[None]:
    """Use a single thread inside the `with` block: where a GPU does all the work, more would only wait."""
    before = getattr(_team, "size", None)
    _team.size = 1
    try:
        yield
    finally:
        if before is None:
            del _team.size
        else:
            _team.size = before


def run(
    work: Callable[[Iterator[_Job]], None],
    jobs: Iterable[_Job],
    *,
    cost: Callable[[_Job], int] | None = None,
    budget: int = 0,
    returned: int | None = None,
) -> None:
    """Run jobs in threads until none is left or one fails.

    Args:
        work: called once in each thread, with the jobs assigned to it.
        jobs: taken one at a time, in order, by the next free thread.
        cost: the cost of a job, in any unit; None for jobs that cost nothing.
        budget: the largest total cost of the jobs in progress. A single job may cost more.
        returned: bytes of the smallest block of memory that goes back to the system when it is freed; smaller blocks
            are reused. None for the default: for whole tensors if jobs have a cost, otherwise for chunks.

    Raises:
        Exception: the first that a thread raised; the other threads stop after their current job.
    """
    size = team_size()
    source = _Source(jobs, cost, budget)
    # Threads queue GPU work on the caller's stream, so that it runs in order and on the same GPU.
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def body() -> None:
        _team.size, _team.scratch = size, {}
        torch.set_num_threads(1)
        try:
            with torch.no_grad(), keep_files_open(), torch.cuda.stream(stream):
                work(source.deal())
        except BaseException as error:  # raised again in the caller
            source.fail(error)

    threads = [threading.Thread(target=body, name=f"freemerge-{index}", daemon=True) for index in range(size)]
    before = torch.get_num_threads()
    heap: AbstractContextManager[None] = nullcontext()  # a nested run keeps the outer setting
    if not hasattr(_team, "size"):
        heap = returning(returned or (REUSED if cost is None else _WHOLE), _SCATTERED // 4 if budget else _SCATTERED)
    with heap:
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C: no thread may continue to write
            source.fail(error)
            for thread in threads:
                thread.join()
        finally:
            torch.set_num_threads(before)  # the number for threads to come, which each of ours has set to 1
    if source.error is not None:
        raise source.error


def each(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Map a function over items in parallel; the results are in the order of the items.

    Methods use it in `combine` to process the K models at the same time.
    """
    if team_size() == 1 or len(items) < 2:
        return [function(item) for item in items]
    results: dict[int, _Result] = {}

    def work(jobs: Iterator[int]) -> None:
        for index in jobs:
            results[index] = function(items[index])
            relieve()

    run(work, range(len(items)))
    return [results[index] for index in range(len(items))]


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Scratch memory with arbitrary contents, for a computation that keeps no result in it.

    Args:
        name: identifies the use. In a worker thread, the next request with this name gets the same memory.
        shape: of the tensor.
        dtype: of the tensor.
        device: of the tensor; only CPU memory is reused.
    """
    kept: dict[str, Tensor] | None = getattr(_team, "scratch", None)
    size = torch.Size(shape).numel() * dtype.itemsize
    if kept is None or device.type != "cpu" or size < _WHOLE:
        return fresh(shape, dtype, device)
    if name not in kept or len(kept[name]) < size:
        kept.pop(name, None)
        kept[name] = fresh((size,), torch.uint8)
    return kept[name][:size].view(dtype).view(shape)


def load_linalg(device: torch.device) -> None:
    """Load `torch.linalg` for a device before threads use it, because the first call on a GPU is not thread-safe."""
    if device.type == "cpu":
        return
    with _loading:
        if device not in _loaded:
            torch.linalg.inv(torch.eye(1, device=device))
            _loaded.add(device)


class _Source(Generic[_Job]):
    """Distributes jobs to threads within a budget."""

    def __init__(self, jobs: Iterable[_Job], cost: Callable[[_Job], int] | None, budget: int) -> None:
        self.error: BaseException | None = None
        self._jobs = iter(jobs)
        self._cost = cost
        self._budget = budget
        self._spent = 0
        self._changed = threading.Condition()
        # A job that does not fit keeps its place: the thread that waits for it holds the lock, so jobs start in order.
        self._turn: AbstractContextManager[Any] = threading.Lock() if cost is not None else nullcontext()

    def deal(self) -> Iterator[_Job]:
        """Yield the jobs of one thread; requesting the next one marks the last as done."""
        while True:
            spent = 0
            with self._turn:
                with self._changed:
                    if self.error is not None:
                        return
                    try:
                        job = next(self._jobs)
                    except StopIteration:
                        return
                if self._cost is not None:
                    spent = self._cost(job)
                    with self._changed:
                        while self._spent and self._spent + spent > self._budget and self.error is None:
                            self._changed.wait()
                        self._spent += spent
            try:
                yield job
            finally:
                if spent:
                    relieve(pause=0.0)
                with self._changed:
                    self._spent -= spent
                    self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()
