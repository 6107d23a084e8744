"""Merging matrices in other coordinates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from freemerge.merging.methods.base import MergeMethod
from freemerge.merging.methods.matrices import stack_shape
from freemerge.merging.methods.wrapper import merge_alone

Merge = Callable[[Tensor], Tensor]


def merge_in_subspaces(
    method: MergeMethod, name: str, deltas: Tensor, change: Callable[[Tensor, Merge], Tensor]
) -> Tensor:
    """Merge a tensor matrix by matrix, in coordinates computed for each matrix.

    Args:
        method: merges the coordinates, and tensors that are not matrices.
        name: name of the tensor.
        deltas: (K, *shape) float32; may be overwritten.
        change: merges (K, m, n) to (m, n), given how to merge coordinates, (K, R, S) → (R, S).

    Returns:
        (*shape) float32, contiguous.
    """
    shape = stack_shape(name, deltas.shape[1:])
    if shape is None or deltas[0].numel() == 0:
        return merge_alone(method, name, deltas)
    stacks = deltas.reshape(len(deltas), *shape)
    merged = [change(stacks[:, index], lambda inner: merge_alone(method, name, inner)) for index in range(shape[0])]
    return torch.stack(merged).view(deltas.shape[1:])
