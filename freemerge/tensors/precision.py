"""What fits into a dtype."""

from __future__ import annotations

import math

import torch


def largest(dtype: torch.dtype) -> float:
    """The least number that is too large to be rounded to a finite value of a dtype: half a unit above its largest."""
    info = torch.finfo(dtype)
    return info.max + 2.0 ** math.floor(math.log2(info.max)) * info.eps / 2
