"""Differences of tensors of any dtypes, θ − θ_base, and their sum with the base; computed in float32 or wider."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from freemerge.runtime.pages import fresh
from freemerge.tensors.chunks import at_a_time
from freemerge.tensors.rounding import IN_MEMORY, to_stored

_BLOCK = 1 << 15  # columns of a whole tensor of K models that are processed at a time, by several threads in parallel


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
    """Write θ − θ_base of one model into `out`.

    Args:
        base: any shape, float32 or float64.
        tensor: that shape, in any floating-point dtype.
        out: (*shape) float32, where the difference is written. float64 operands are subtracted in float64.
    """
    if base.dtype is tensor.dtype is torch.float32:
        torch.sub(tensor, base, out=out)
    elif torch.float64 in (base.dtype, tensor.dtype):
        out.copy_(tensor.double() - base.double())
    else:
        out.copy_(tensor).sub_(base)  # subtracting two dtypes would allocate a converted copy first


def flat(deltas: Tensor) -> Tensor:
    """Reshape (K, *shape) to (K, n); scalars and empty tensors too."""
    return deltas.reshape(len(deltas), deltas.shape[1:].numel())


def blocks(values: Tensor) -> tuple[Tensor, ...]:
    """Yield views (K, ≤ n) of a whole tensor of K models, (K, n), of a size that suits its device."""
    return values.split(at_a_time(_BLOCK, values.device, len(values)), dim=1)


def add(name: str, base: Tensor, delta: Tensor, method: object = None) -> Tensor:
    """θ_base + τ in new memory, rounded once to the base's dtype.

    Args:
        name: of the tensor, for messages.
        base: any shape, any floating-point dtype.
        delta: the same shape, float32.
        method: the name of the method that merged τ, for messages.

    Raises:
        MergeError: a value is NaN or infinite, or overflows the base's dtype.
    """
    return to_stored(add_wide(base, delta), base.dtype, name, method, IN_MEMORY)


def add_wide(base: Tensor, delta: Tensor) -> Tensor:
    """θ_base + τ in new memory, in float32, or in float64 for a float64 base."""
    return base.detach().to(working_dtype(base.dtype)) + delta


def widened(tensor: Tensor) -> Tensor:
    """The tensor in its working dtype; the same object if it already has that dtype."""
    dtype = working_dtype(tensor.dtype)
    return tensor if tensor.dtype == dtype else fresh(tensor.shape, dtype, tensor.device).copy_(tensor)


def working_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The working dtype: float64 if any dtype is float64, otherwise float32; arithmetic never uses narrower types."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
