"""Machine resources: threads, processes, copies to and from devices, memory, file reads."""

from typing import TYPE_CHECKING, Any

from freemerge.runtime.heap import own_process

if TYPE_CHECKING:
    from freemerge.runtime.processes import Processes as Processes

__all__ = ["Processes", "own_process"]


def __getattr__(name: str) -> Any:
    if name == "Processes":  # loaded when it is first used, as it imports torch, which the command line does last
        from freemerge.runtime.processes import Processes

        return Processes
    raise AttributeError(f"module 'freemerge.runtime' has no attribute {name!r}")
