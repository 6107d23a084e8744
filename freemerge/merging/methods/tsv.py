"""TSV-Merge: task singular vectors, compressed and decorrelated (Gargiulo et al., CVPR 2025, arXiv 2412.00081)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from freemerge.merging.methods.matrices import MatrixMethod
from freemerge.runtime.threads import each
from freemerge.tensors.spectra import leading_components, rounding, to_nearest_isometry_


@dataclass(frozen=True)
class TSVMerge(MatrixMethod):
    """Give each task an equal part of a matrix's singular directions, and orthogonalize the parts. One pass.

    For a matrix of shape (m, n) and K tasks:

    1. v_k = U_k Σ_k V_kᵀ, of which the ⌊min(m, n)/K⌋ largest components (at least one) are kept, except those that are
       only rounding (σ ≤ ε·(√m + √n)·σ_max).
    2. U = [U_1 … U_K] and V = [V_1 … V_K] are replaced by the nearest matrices with orthonormal columns: with the
       singular value decomposition U = P D Qᵀ, U⊥ = P Qᵀ (orthogonal Procrustes).
    3. τ = scale · U⊥ diag(Σ_1 … Σ_K) V⊥ᵀ.

    Tensors that are not matrices are averaged. The released code averages convolutions and stacked experts too.

    Args:
        scale: multiplies the result.
        filter: see `MatrixMethod`.
        align: see `MatrixMethod`.
    """

    linear_in_scale: ClassVar = True

    def combine_matrix(self, name: str, matrices: Tensor) -> Tensor:
        wide = matrices.shape[1] <= matrices.shape[2]
        # (K, s, l), s ≤ l: singular vectors have a short and a long side
        oriented = matrices if wide else matrices.mT
        short, values, long = _leading(oriented, max(1, oriented.shape[1] // len(oriented)))
        if not len(values):
            return torch.zeros_like(matrices[0])
        to_nearest_orthonormal_(short)
        to_nearest_orthonormal_(long)
        short *= values
        return short @ long if wide else long.T @ short.T


def _leading(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading components of K wide matrices, side by side: R ≤ K · rank in all.

    They are stored in the memory of the matrices, as the components of a model take no more memory than the model.

    Args:
        matrices: (K, s, l) float32 with s ≤ l; overwritten.
        rank: upper bound of the rank of each. A zero or low-rank matrix has fewer directions, and must not affect those
            of the others.

    Returns:
        U (s, R) and Σ (R,) in new memory, and Vᵀ (R, l) in that of the matrices, all float32.
    """
    memory = (matrices if matrices.is_contiguous() else matrices.mT).view(len(matrices), -1)
    tolerance = rounding(*matrices.shape[1:])

    def decompose(index: int) -> tuple[Tensor, Tensor]:
        side, values, rows = leading_components(matrices[index], rank, tolerance)
        memory[index, : rows.numel()] = rows.reshape(-1)
        return side, values

    sides, spectra = zip(*each(decompose, range(len(matrices))), strict=True)
    length, found, run = matrices.shape[2], 0, memory.view(-1)
    for own, values in zip(memory, spectra, strict=True):  # close the gaps, starting at the first
        size = len(values) * length
        run[found : found + size] = own[:size]
        found += size
    values = torch.cat(spectra)
    return torch.cat(sides, dim=1), values, run[:found].view(len(values), length)


def to_nearest_orthonormal_(matrix: Tensor) -> None:
    """Replace a matrix P D Qᵀ by P Qᵀ, the nearest one with orthonormal columns (or rows, if it is wide).

    Args:
        matrix: (m, n) float32; overwritten.
    """
    to_nearest_isometry_(matrix, rounding(*matrix.shape))
