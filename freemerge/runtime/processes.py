"""The processes that share one merge: those of torch.distributed, or only this one."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from freemerge.errors import MergeError
from freemerge.runtime.process_group import in_process_group, rank_and_world

_Result = TypeVar("_Result")

_PATIENCE = timedelta(days=1)  # a merge may keep one process busy for long while the others wait


class Processes:
    """The processes that share the work, this one included; all of them must make the same calls.

    Args:
        shared: share it with all processes of torch.distributed's default group, which must be initialized. They
            communicate through a separate gloo group, whatever the default group's backend is.

    Raises:
        MergeError: `shared` without a process group.
    """

    def __init__(self, shared: bool = False) -> None:
        self.rank, self.size = 0, 1
        self._group: dist.ProcessGroup | None = None
        if not shared:
            return
        if not in_process_group():
            raise MergeError("a distributed merge needs torch.distributed.init_process_group first (torchrun)")
        self.rank, self.size = rank_and_world()
        if self.size > 1:
            group = dist.new_group(backend="gloo", timeout=_PATIENCE)
            # `new_group` returns a number only to non-members, and every process is a member
            assert not isinstance(group, int)
            self._group = group

    def close(self) -> None:
        """Destroy the group."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def share(self, shapes: Mapping[str, Sequence[int]]) -> list[str]:
        """The tensors assigned to this process, in the given order; all processes get about as many values."""
        if self.size == 1:
            return list(shapes)
        sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        loads = [0] * self.size
        own = set()
        # largest first, each to the process with the fewest values so far
        for name in sorted(sizes, key=lambda name: -sizes[name]):
            rank = loads.index(min(loads))
            loads[rank] += sizes[name]
            if rank == self.rank:
                own.add(name)
        return [name for name in shapes if name in own]

    def together(self, function: Callable[[], _Result]) -> list[_Result]:
        """Call a function in every process; if it fails in one, all raise the same error.

        Returns:
            The results of all processes, by rank.
        """
        if self._group is None:
            return [function()]
        error: BaseException | None = None
        result = None
        try:
            result = function()
        except Exception as raised:
            error = raised
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, (result, _portable(error)), group=self._group)
        if error is not None:
            raise error
        for rank, (_, failed) in enumerate(found):
            if failed is not None:
                raise failed if isinstance(failed, MergeError) else MergeError(f"process {rank} failed: {failed}")
        return [value for value, _ in found]

    def gather(self, value: _Result) -> list[_Result]:
        """Gather one value from every process, by rank."""
        return self.together(lambda: value)

    def first(self, function: Callable[[], _Result]) -> _Result:
        """Call a function only in the first process; all get its result or its error."""
        return self.together(lambda: [function()] if self.rank == 0 else [])[0][0]


def _portable(error: BaseException | None) -> Any:
    """Convert an error to a picklable value."""
    if error is None:
        return None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a third-party exception may raise anything when it is pickled
        return f"{type(error).__name__}: {error}"
    return error if isinstance(error, MergeError) else f"{type(error).__name__}: {error}"
