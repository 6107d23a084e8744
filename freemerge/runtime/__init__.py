"""Machine resources: threads, processes, copies to and from devices, memory, file reads."""

from freemerge.runtime.heap import own_process
from freemerge.runtime.processes import Processes

__all__ = ["Processes", "own_process"]
