"""Threads that work side by side on a stream of jobs.

Each runs single-threaded operations. So the work scales with the threads whatever its operations are, and no result
depends on how many there are.
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

# In a thread of ours: .size, how many may work side by side; .scratch, memory that it uses again.
_team = threading.local()

_loading = threading.Lock()
_loaded: set[torch.device] = set()

_WHOLE = 1 << 20  # from here on a block is (or is of) a whole tensor, while such are worked on
_SCATTERED = 32 << 20  # bytes of free memory that may lie scattered; a quarter where whole tensors need the room


def team_size() -> int:
    """How many threads may work side by side: as many as torch would use (OMP_NUM_THREADS, `torch.set_num_threads`)."""
    return getattr(_team, "size", None) or torch.get_num_threads()


@contextmanager
def one_thread() -> Iterator[None]:
    """For the duration of a block there is one thread: where a GPU does all the work, more only wait for each other."""
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
    """Let threads work on jobs until none is left, or one fails.

    Args:
        work: called once in each thread, with the jobs that fall to it.
        jobs: taken one at a time, in order, by whichever thread is free.
        cost: of a job, in any unit; None for jobs that cost nothing.
        budget: what the jobs that are worked on may cost together. A single job may cost more.
        returned: blocks of memory of so many bytes go back to the system when they are freed, smaller ones are used
            again; None for what suits whole tensors if jobs have a cost, and chunks if not.

    Raises:
        Exception: the first that a thread raised; the others stop after the job that they are at.
    """
    size = team_size()
    source = _Source(jobs, cost, budget)
    # What threads ask of a GPU is queued where their caller's work is: so it is done in order, and on the same GPU.
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def body() -> None:
        _team.size, _team.scratch = size, {}
        torch.set_num_threads(1)
        try:
            with torch.no_grad(), keep_files_open(), torch.cuda.stream(stream):
                work(source.deal())
        except BaseException as error:  # handed on to the caller
            source.fail(error)

    threads = [threading.Thread(target=body, name=f"freemerge-{index}", daemon=True) for index in range(size)]
    before = torch.get_num_threads()
    heap: AbstractContextManager[None] = nullcontext()  # within another run its setting holds
    if not hasattr(_team, "size"):
        heap = returning(returned or (REUSED if cost is None else _WHOLE), _SCATTERED // 4 if budget else _SCATTERED)
    with heap:
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C: nobody may go on writing
            source.fail(error)
            for thread in threads:
                thread.join()
        finally:
            torch.set_num_threads(before)  # the number for threads to come, which each of ours has set to 1
    if source.error is not None:
        raise source.error


def each(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Results of a function for all items, in their order, computed side by side.

    For a method's `combine` to treat its K models at the same time.
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
    """Memory with arbitrary contents, for a computation that leaves nothing in it.

    Args:
        name: of its use. In a thread of ours the next use of this name takes the same memory.
        shape: of the tensor.
        dtype: of the tensor.
        device: of the tensor; only the CPU's memory is kept.
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
    """To be called before `torch.linalg` is used on a device: torch loads a GPU's part of it when it is first called,
    and fails if several threads call it then."""
    if device.type == "cpu":
        return
    with _loading:
        if device not in _loaded:
            torch.linalg.inv(torch.eye(1, device=device))
            _loaded.add(device)


class _Source(Generic[_Job]):
    """Deals jobs out to threads, within a budget."""

    def __init__(self, jobs: Iterable[_Job], cost: Callable[[_Job], int] | None, budget: int) -> None:
        self.error: BaseException | None = None
        self._jobs = iter(jobs)
        self._cost = cost
        self._budget = budget
        self._spent = 0
        self._changed = threading.Condition()
        # A job that does not fit keeps its place: whoever waits for it holds the turn, so that jobs go out in order.
        self._turn: AbstractContextManager[Any] = threading.Lock() if cost is not None else nullcontext()

    def deal(self) -> Iterator[_Job]:
        """The jobs of one thread; asking for the next says that the last is done."""
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
