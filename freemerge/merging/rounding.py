"""From float32 to the dtype that is stored: rounded once, to nearest even; a value that does not fit is an error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from freemerge.merging.errors import MergeError


def round_to(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Round the values of a tensor to a dtype.

    Args:
        values: any shape, float32 or float64; NaN and infinity pass.
        dtype: the dtype to store.
        name: of the tensor, for messages.

    Returns:
        The same shape in `dtype`; the same tensor if it has that dtype already.

    Raises:
        MergeError: a finite value is too large for the dtype. torch would make it infinite (float16, bfloat16,
            float8_e5m2) or cut it off at the largest value (float8_e4m3fn): neither is the model that was asked for.
    """
    if dtype == values.dtype or not dtype.is_floating_point or values.numel() == 0:
        return values.to(dtype)
    limit = largest(dtype)
    low, high = (float(value) for value in torch.aminmax(values))
    if not (-limit < low and high < limit):
        over = values[torch.isfinite(values) & (values.abs() >= limit)]
        if len(over):
            raise MergeError(
                f"the merged tensor '{name}' has {len(over):,} values that do not fit into {_name(dtype)} (the first "
                f"is {float(over[0]):g}, its largest {torch.finfo(dtype).max:g}); write dtype='bfloat16' or 'float32'"
            )
    return values.to(dtype)


def largest(dtype: torch.dtype) -> float:
    """The least number that is too large to be rounded to a finite value of a dtype: half a unit above its largest."""
    info = torch.finfo(dtype)
    return info.max + 2.0 ** math.floor(math.log2(info.max)) * info.eps / 2


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
