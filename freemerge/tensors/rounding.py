"""From float32 to the dtype that is stored: rounded once, to nearest even; a value that does not fit is an error."""

from __future__ import annotations

import torch
from torch import Tensor

from freemerge.errors import MergeError
from freemerge.tensors.precision import largest

_OTHER_DTYPE = "write dtype='bfloat16' or 'float32'"


IN_MEMORY = "convert the base to bfloat16 or float32 first"  # where the result has the base's dtype and no other


def to_stored(
    values: Tensor, dtype: torch.dtype, name: str, method: object = None, advice: str | None = None
) -> Tensor:
    """What becomes of the values of every merged tensor: they are finite, and rounded once.

    Args:
        values: any shape, float32 or float64.
        dtype: the dtype to store.
        name: of the tensor, for messages.
        method: what merged them, for messages.
        advice: see `round_to`.

    Returns:
        The same shape in `dtype`.

    Raises:
        MergeError: a value is NaN or infinite, or would be in `dtype`.
    """
    # One sum finds any NaN or infinity; only when it does (or overflows) is it worth a second look.
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
        advice: what to do about values that do not fit; by default to ask for another dtype.

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
                f"is {float(over[0]):g}, its largest {torch.finfo(dtype).max:g}); {advice or _OTHER_DTYPE}"
            )
    return values.to(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
