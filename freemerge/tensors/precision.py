"""The range of a dtype."""

from __future__ import annotations

import math

import torch


def largest(dtype: torch.dtype) -> float:
    """The smallest number that does not round to a finite value of a dtype: half a unit above the largest one."""
    info = torch.finfo(dtype)
    return info.max + 2.0 ** math.floor(math.log2(info.max)) * info.eps / 2
