"""Differences of tensors of any dtypes, θ − θ_base, and their sum with the base; never computed in narrow types."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from freemerge.runtime.pages import fresh
from freemerge.tensors.chunks import at_a_time
from freemerge.tensors.rounding import IN_MEMORY, to_stored

_BLOCK = 1 << 15  # columns of a whole tensor of K models that are looked at at a time, by several threads side by side


def differences(base: Tensor, tensors: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """θ_k − θ_base for K models.

    Args:
        base: any shape, any floating-point dtype.
        tensors: K tensors of that shape, in any floating-point dtypes.
        out: (K, *shape) float32 on the base's device, to write to; new memory if None.

    Returns:
        (K, *shape) float32 on the base's device. float64 operands are subtracted in float64.
    """
    reference = base.detach().to(working_dtype(base.dtype))
    deltas = torch.empty(len(tensors), *base.shape, dtype=torch.float32, device=base.device) if out is None else out
    for tensor, delta in zip(tensors, deltas, strict=True):
        subtract(reference, tensor.detach().to(base.device), delta)
    return deltas


def subtract(base: Tensor, tensor: Tensor, out: Tensor) -> None:
    """Write θ − θ_base of one model.

    Args:
        base: any shape, float32 or float64.
        tensor: that shape, in any floating-point dtype.
        out: (*shape) float32, where it is written. float64 operands are subtracted in float64.
    """
    if base.dtype is tensor.dtype is torch.float32:
        torch.sub(tensor, base, out=out)
    elif torch.float64 in (base.dtype, tensor.dtype):
        out.copy_(tensor.double() - base.double())
    else:
        out.copy_(tensor).sub_(base)  # a difference of two dtypes would convert to new memory first


def flat(deltas: Tensor) -> Tensor:
    """(K, *shape) → (K, n), for scalars and empty tensors too."""
    return deltas.reshape(len(deltas), deltas.shape[1:].numel())


def blocks(values: Tensor) -> tuple[Tensor, ...]:
    """A whole tensor of K models, (K, n), in parts (K, ≤ n) that suit where it is; views."""
    return values.split(at_a_time(_BLOCK, values.device, len(values)), dim=1)


def add(name: str, base: Tensor, delta: Tensor, method: object = None) -> Tensor:
    """θ_base + τ, rounded to the base's dtype once; in new memory.

    Args:
        name: of the tensor, for messages.
        base: any shape, any floating-point dtype.
        delta: the same shape, float32.
        method: what merged τ, for messages.

    Raises:
        MergeError: a value is NaN or infinite, or would be in the base's dtype.
    """
    return to_stored(add_wide(base, delta), base.dtype, name, method, IN_MEMORY)


def add_wide(base: Tensor, delta: Tensor) -> Tensor:
    """θ_base + τ in float32, or float64 for a float64 base; in new memory."""
    return base.detach().to(working_dtype(base.dtype)) + delta


def widened(tensor: Tensor) -> Tensor:
    """The tensor in its working dtype; itself if it is in it already."""
    dtype = working_dtype(tensor.dtype)
    return tensor if tensor.dtype == dtype else fresh(tensor.shape, dtype, tensor.device).copy_(tensor)


def working_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 if any dtype is float64, else float32: narrower types are never computed in."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
