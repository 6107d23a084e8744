"""Iso-CTS: isotropic merging in common and task-specific subspaces (Marczak et al., ICML 2025, arXiv 2502.04959)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from freemerge.merging.methods.base import require, require_number, weighted_sum
from freemerge.merging.methods.matrices import MatrixMethod
from freemerge.runtime.threads import each
from freemerge.tensors.spectra import leading_components, rounding, to_nearest_isometry_


@dataclass(frozen=True)
class IsoCTS(MatrixMethod):
    """Replace the least directions of the summed task vectors by the tasks' own, and flatten the spectrum. One pass.

    For a matrix of shape (m, n), r = min(m, n), and K tasks, each of which gets t = round((r − ⌊common·r⌋)/K)
    directions of its own:

    1. Σ_k v_k = U diag(σ) Vᵀ; its r − K·t largest components are the common ones, U_c, σ_c, V_c.
    2. v_k − U_c U_cᵀ v_k, what each task has outside of them: its t largest components U_k, σ_k, V_k.
    3. U = [U_1 … U_K, U_c] and V likewise are replaced by the nearest matrices with orthonormal columns, U⊥ and V⊥.
    4. τ = scale · mean(σ_1 … σ_K, σ_c) · U⊥ V⊥ᵀ.

    Directions with nothing but rounding are left out, of the mean too. What is no matrix is averaged; the released code
    averages convolutions and stacked experts too.

    Args:
        scale: multiplies the result.
        filter: see `MatrixMethod`.
        align: see `MatrixMethod`.
        common: fraction of the directions that are common, in [0, 1]; the released code's 0.8.
    """

    linear_in_scale: ClassVar = True

    common: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "common", self.common)
        require(0 <= self.common <= 1, self, f"`common` must lie in [0, 1], got {self.common}")

    def combine_matrix(self, name: str, matrices: Tensor) -> Tensor:
        if matrices.shape[1] <= matrices.shape[2]:
            return self._merge_wide(matrices, outside_rows=True)
        return self._merge_wide(matrices.mT, outside_rows=False).T

    def _merge_wide(self, matrices: Tensor, outside_rows: bool) -> Tensor:
        """Merge (K, s, l) with s ≤ l; U_c is the short side's, or the long side's where the matrices were turned."""
        models, size = len(matrices), matrices.shape[1]
        tolerance = rounding(*matrices.shape[1:])
        own = round((size - int(size * self.common)) / models)
        common = max(0, size - models * own)
        side, values, rows = leading_components(weighted_sum(matrices, 1.0), common, tolerance)

        def outside(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if outside_rows:
                rest = torch.addmm(matrix, side, side.T @ matrix, alpha=-1)
            else:
                rest = torch.addmm(matrix, matrix @ rows.T, rows, alpha=-1)
            # What is left of a task's own rounding is no direction.
            whole, left = (float(torch.linalg.vector_norm(part)) for part in (matrix, rest))
            return leading_components(rest, own, tolerance * max(1.0, whole / left if left else 1.0))

        sides, spectra, longs = zip(*each(outside, list(matrices)), (side, values, rows), strict=True)
        short, spectrum, long = torch.cat(sides, dim=1), torch.cat(spectra), torch.cat(longs)
        if not len(spectrum):
            return torch.zeros(matrices.shape[1:], dtype=matrices.dtype, device=matrices.device)
        for factor in (short, long):
            to_nearest_isometry_(factor, rounding(*factor.shape))
        return short.mul_(spectrum.mean()) @ long
