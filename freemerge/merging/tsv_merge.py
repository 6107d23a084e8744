"""TSV-Merge: task singular vectors, compressed and decorrelated (Gargiulo et al., CVPR 2025, arXiv 2412.00081)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from freemerge.merging.method import MergeMethod, require_number, weighted_sum
from freemerge.merging.spectra import left_spectrum, nearest_isometry, rounding
from freemerge.merging.threads import each


@dataclass(frozen=True)
class TSVMerge(MergeMethod):
    """Give each task its share of the singular directions of a matrix, and make the shares orthogonal. One pass.

    For a matrix of shape (m, n) and K tasks:

    1. v_k = U_k Σ_k V_kᵀ, of which the ⌊min(m, n)/K⌋ largest components (at least one) are kept, but
       nothing that is mere rounding (σ ≤ ε·(√m + √n)·σ_max).
    2. U = [U_1 … U_K] and V = [V_1 … V_K] are replaced by the nearest matrices with orthonormal columns: with the
       singular value decomposition U = P D Qᵀ, U⊥ = P Qᵀ (orthogonal Procrustes).
    3. τ = scale · U⊥ diag(Σ_1 … Σ_K) V⊥ᵀ.

    Tensors that are not matrices are averaged, as in the released code.

    Args:
        scale: multiplies the result.
    """

    survey_fields: ClassVar = ()

    scale: float = 1.0

    def __post_init__(self) -> None:
        require_number(self, "scale", self.scale)

    def combine(self, name: str, deltas: Tensor, statistics: Any) -> Tensor:
        if deltas.dim() != 3 or deltas[0].numel() == 0:
            return weighted_sum(deltas, self.scale / len(deltas))
        rank = max(1, min(deltas.shape[1:]) // len(deltas))
        # What has no directions of its own, a vector of zeros or one of low rank, must not turn those of the others.
        found = each(lambda delta: _leading(delta, rank), list(deltas))
        left, values, right = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
        del found  # as large as a tensor
        if not len(values):
            return torch.zeros_like(deltas[0])
        left, right = nearest_orthonormal(left), nearest_orthonormal(right)
        return (left * (values * self.scale)) @ right.T


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """At most `rank` leading components of a matrix (m, n): U (m, r), Σ (r,), V (n, r), float32."""
    if matrix.shape[0] > matrix.shape[1]:
        right, values, left = _leading(matrix.T, rank)
        return left, values, right
    left, values = (part[..., :rank].to(matrix.dtype) for part in left_spectrum(matrix, rounding(*matrix.shape)))
    return left, values, matrix.T @ (left / values)


def nearest_orthonormal(matrix: Tensor) -> Tensor:
    """The matrix with orthonormal columns (or rows, if it is wide) that is nearest to a matrix: P Qᵀ of its P D Qᵀ.

    Args:
        matrix: (m, n) float32.

    Returns:
        (m, n) float32.
    """
    return nearest_isometry(matrix, rounding(*matrix.shape))[0]
