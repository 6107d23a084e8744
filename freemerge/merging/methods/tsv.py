"""TSV-Merge: task singular vectors, compressed and decorrelated (Gargiulo et al., CVPR 2025, arXiv 2412.00081)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from freemerge.merging.methods.base import MergeMethod, require_number, weighted_sum
from freemerge.tensors.spectra import left_spectrum, rounding, to_nearest_isometry_


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

    statistics_fields: ClassVar = ()
    linear_in_scale: ClassVar = True

    scale: float = 1.0

    def __post_init__(self) -> None:
        require_number(self, "scale", self.scale)

    def combine(self, name: str, deltas: Tensor, statistics: Any) -> Tensor:
        if deltas.dim() != 3 or deltas[0].numel() == 0:
            return weighted_sum(deltas, self.scale / len(deltas))
        wide = deltas.shape[1] <= deltas.shape[2]
        matrices = deltas if wide else deltas.mT  # (K, s, l), s ≤ l: singular vectors have a short and a long side
        short, values, long = _leading(matrices, max(1, matrices.shape[1] // len(deltas)))
        if not len(values):
            return torch.zeros_like(deltas[0])
        to_nearest_orthonormal_(short)
        to_nearest_orthonormal_(long)
        short *= values * self.scale
        return short @ long if wide else long.T @ short.T


def _leading(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading components of K wide matrices, side by side: R ≤ K · rank in all.

    They are found one model after the other, which takes less memory than side by side, and laid into that of the
    matrices: components of a model take no more room than the model itself.

    Args:
        matrices: (K, s, l) float32 with s ≤ l; overwritten.
        rank: of each, at most. What has no directions of its own, a vector of zeros or one of low rank, has fewer, and
            must not turn those of the others.

    Returns:
        U (s, R) and Σ (R,) in new memory, and Vᵀ (R, l) in that of the matrices, all float32.
    """
    memory = (matrices if matrices.is_contiguous() else matrices.mT).view(-1)
    tolerance = rounding(*matrices.shape[1:])
    sides, spectra, found = [], [], 0
    for matrix in matrices:
        side, values = (part[..., :rank].to(matrix.dtype, copy=True) for part in left_spectrum(matrix, tolerance))
        rows = (side / values).T @ matrix
        memory[found : found + rows.numel()] = rows.reshape(-1)
        found += rows.numel()
        sides.append(side)
        spectra.append(values)
    values = torch.cat(spectra)
    return torch.cat(sides, dim=1), values, memory[:found].view(len(values), matrices.shape[2])


def to_nearest_orthonormal_(matrix: Tensor) -> None:
    """Make a matrix into the nearest one with orthonormal columns (or rows, if it is wide): P Qᵀ of its P D Qᵀ.

    Args:
        matrix: (m, n) float32; overwritten.
    """
    to_nearest_isometry_(matrix, rounding(*matrix.shape))
