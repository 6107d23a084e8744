"""Rounding from float32 to the stored dtype: once, to nearest even; a value that overflows is an error."""

from __future__ import annotations

import torch
from torch import Tensor

from freemerge.errors import MergeError
from freemerge.tensors.precision import largest

_OTHER_DTYPE = "write dtype='bfloat16' or 'float32'"


IN_MEMORY = "convert the base to bfloat16 or float32 first"  # for results that always have the base's dtype


def to_stored(
    values: Tensor, dtype: torch.dtype, name: str, method: object = None, advice: str | None = None
) -> Tensor:
    """Check that the values of a merged tensor are finite, and round them once.

    Args:
        values: any shape, float32 or float64.
        dtype: the dtype to store.
        name: of the tensor, for messages.
        method: the name of the method that merged them, for messages.
        advice: see `round_to`.

    Returns:
        The same shape in `dtype`.

    Raises:
        MergeError: a value is NaN or infinite, or overflows `dtype`.
    """
    # One sum detects any NaN or infinity; only if it does (or overflows) the values are checked one by one.
    if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
        maker = f"{type(method).__name__}: " if method is not None else ""
        raise MergeError(f"{maker}the merged tensor '{name}' has NaN or infinite values")
    return round_to(values, dtype, name, advice)


def round_to(values: Tensor, dtype: torch.dtype, name: str, advice: str | None = None) -> Tensor:
    """Round the values of a tensor to a dtype.

    Args:
        values: any shape, float32 or float64; NaN and infinity pass.
        dtype: the dtype to store.
        name: of the tensor, for messages.
        advice: what the message suggests if a value overflows; by default another dtype.

    Returns:
        The same shape in `dtype`; the same tensor if it has that dtype already.

    Raises:
        MergeError: a finite value is too large for the dtype. torch would make it infinite (float16, bfloat16,
            float8_e5m2) or clamp it to the largest value (float8_e4m3fn), both of which would change the model
            silently.
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
                f"is {float(over[0]):g}, its largest {torch.finfo(dtype).max:g}); {advice or _OTHER_DTYPE}"
            )
    return values.to(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
