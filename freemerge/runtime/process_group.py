"""This process's rank and the number of processes."""

from __future__ import annotations

import torch.distributed as dist


def in_process_group() -> bool:
    """Whether torch.distributed's default group is initialized."""
    return dist.is_available() and dist.is_initialized()


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if in_process_group() else (0, 1)
