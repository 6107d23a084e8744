"""The rank of this process among the processes of a run."""

from __future__ import annotations

from lightning.pytorch.utilities.rank_zero import rank_zero_only


def is_first() -> bool:
    """Whether this process has rank 0, by the launcher's environment or, later, by the process group."""
    return getattr(rank_zero_only, "rank", 0) == 0
