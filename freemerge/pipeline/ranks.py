"""Which of the processes of a run this one is."""

from __future__ import annotations

from lightning.pytorch.utilities.rank_zero import rank_zero_only


def is_first() -> bool:
    """Whether this process is the first, as Lightning counts them: by the launcher's environment, then by its group."""
    return getattr(rank_zero_only, "rank", 0) == 0
