"""Copies between the processor's memory and a GPU's, beside the arithmetic of both.

All arithmetic of a merge is queued on one stream of the GPU, whichever thread asks for it, so that it needs no other
order. The copies have a stream for each direction. They go through pinned memory: only from there do they run on their
own, and twice as fast.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Transfer:
    """Copies to a GPU and back; from any thread.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def inward(self, values: Tensor) -> Tensor:
        """Values on the GPU, for what is queued on the current stream from now on.

        Args:
            values: any shape and dtype, on the CPU.
        """
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._in):
            moved = values.pin_memory().to(self._device, non_blocking=True)
        current.wait_stream(self._in)
        moved.record_stream(current)  # or its memory would be free for the next copy once nobody holds it
        return moved

    def outward(self, values: Tensor) -> Tensor:
        """Values in the processor's memory, when all is there.

        Args:
            values: any shape and dtype, on the GPU.
        """
        arrived = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            arrived.copy_(values, non_blocking=True)
            copied = self._out.record_event()
        copied.synchronize()
        return arrived
