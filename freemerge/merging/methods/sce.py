"""SCE: select by variance, calculate coefficients, erase minorities (FuseChat, Wan et al., arXiv 2408.07990)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from freemerge.merging.methods.base import MergeMethod, require, require_number
from freemerge.merging.task_vectors import blocks, flat


@dataclass(frozen=True)
class SCE(MergeMethod):
    """Weight the task vectors of each tensor by their squares, where they differ most and agree in sign. One pass.

    1. Select: of the entries at which the task vectors differ at all, the ⌊select·count⌋ with the largest variance over
       the models stay (ties with the last are kept too); the others are set to zero.
    2. Calculate: η_k = Σ v_k²/Σ_j Σ v_j², over the remaining entries of the tensor.
    3. Erase: entries whose sign is not that of Σ_k v_k have no weight.
    4. τ = scale · Σ_k η_k v_k/Σ_k η_k, over the entries that have a weight; zero where none has.

    Args:
        scale: multiplies the result.
        select: fraction of the entries that stay, in (0, 1]; 1 skips the selection.
    """

    statistics_fields: ClassVar = ()
    linear_in_scale: ClassVar = True

    scale: float = 1.0
    select: float = 1.0

    def __post_init__(self) -> None:
        require_number(self, "scale", self.scale)
        require_number(self, "select", self.select)
        require(0 < self.select <= 1, self, f"`select` must lie in (0, 1], got {self.select}")

    def combine(self, name: str, deltas: Tensor, statistics: Any) -> Tensor:
        values = flat(deltas)
        if self.select < 1 and values.shape[1]:
            _select_(values, self.select)
        squares = torch.stack([row.square().sum(dtype=torch.float64) for row in values])
        # Only the ratios of the weights matter.
        weights = (squares / squares.max().clamp(min=torch.finfo(torch.float64).tiny)).to(values.dtype)[:, None]
        merged = [_merge(block, weights) for block in blocks(values)]
        return torch.cat(merged).mul_(self.scale).reshape(deltas.shape[1:])


def _select_(values: Tensor, fraction: float) -> None:
    """Zero the entries of (K, n) at which the models differ little."""
    variance = torch.cat([block.var(dim=0, correction=0) for block in blocks(values)])  # (n,)
    count = int(fraction * int(variance.count_nonzero()))
    if count == 0:
        values.zero_()
        return
    least = float(np.partition(variance.cpu().numpy(), len(variance) - count)[len(variance) - count])
    values.masked_fill_(variance < least, 0.0)


def _merge(values: Tensor, weights: Tensor) -> Tensor:
    """(K, n) and (K, 1) → (n,)."""
    sign = torch.where(values.sum(dim=0) >= 0, 1.0, -1.0)
    kept = weights * (values.sign() == sign)
    total = kept.sum(dim=0)
    return (values * kept).sum(dim=0) / torch.where(total > 0, total, 1.0)
