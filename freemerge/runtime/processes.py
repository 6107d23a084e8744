"""The processes that share one merge: those of torch.distributed, or this one alone."""

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
    """This process and those with which it shares the work; all of them must make the same calls.

    Args:
        shared: share it with all processes of torch.distributed's default group, which must be initialized. They talk
            through a group of their own on gloo, whatever the default group's backend is.

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
            assert not isinstance(group, int)  # a process that is no member gets a number, and all are members
            self._group = group

    def close(self) -> None:
        """Give the group up."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def share(self, shapes: Mapping[str, Sequence[int]]) -> list[str]:
        """The tensors that fall to this process, in the given order: about as many values as to any other."""
        if self.size == 1:
            return list(shapes)
        sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        loads = [0] * self.size
        own = set()
        for name in sorted(sizes, key=lambda name: -sizes[name]):  # the largest first, each to the least busy
            rank = loads.index(min(loads))
            loads[rank] += sizes[name]
            if rank == self.rank:
                own.add(name)
        return [name for name in shapes if name in own]

    def together(self, function: Callable[[], _Result]) -> list[_Result]:
        """Call a function in every process; if it fails in one, all fail alike.

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
        """One value of every process, by rank."""
        return self.together(lambda: value)

    def first(self, function: Callable[[], _Result]) -> _Result:
        """Call a function in the first process alone; all get its result, or its error."""
        return self.together(lambda: [function()] if self.rank == 0 else [])[0][0]


def _portable(error: BaseException | None) -> Any:
    """An error as something that can be sent."""
    if error is None:
        return None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a third party's exception does when it is pickled
        return f"{type(error).__name__}: {error}"
    return error if isinstance(error, MergeError) else f"{type(error).__name__}: {error}"
