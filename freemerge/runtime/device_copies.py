"""Copies between CPU and GPU memory that overlap with the arithmetic on both.

All arithmetic of a merge is queued on one GPU stream by every thread, so it needs no further synchronization. Each copy
direction has its own stream. Copies go through pinned memory: only pinned copies are asynchronous, and they are twice
as fast.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Transfer:
    """Copies to a GPU and back; may be used from any thread.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def inward(self, values: Tensor) -> Tensor:
        """Copy values to the GPU; work queued on the current stream from now on sees them.

        Args:
            values: any shape and dtype, on the CPU.
        """
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._in):
            moved = values.pin_memory().to(self._device, non_blocking=True)
        current.wait_stream(self._in)
        # else the allocator could reuse the memory for the next copy once the tensor is released
        moved.record_stream(current)
        return moved

    def outward(self, values: Tensor) -> Tensor:
        """Copy values to CPU memory; returns when the copy is complete.

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
