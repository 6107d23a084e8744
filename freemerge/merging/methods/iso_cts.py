"""Iso-CTS: isotropic merging in common and task-specific subspaces (Marczak et al., ICML 2025, arXiv 2502.04959)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from freemerge.merging.methods.base import require, require_number, weighted_sum
from freemerge.merging.methods.matrices import MatrixMethod
from freemerge.runtime.threads import each
from freemerge.tensors.spectra import leading_components, left_spectrum, rounding, to_nearest_isometry_


@dataclass(frozen=True)
class IsoCTS(MatrixMethod):
    """Replace the weakest directions of the summed task vectors by task-specific ones, flatten the spectrum. One pass.

    For a matrix of shape (m, n), r = min(m, n), and K tasks, each with t = round((r − ⌊common·r⌋)/K) task-specific
    directions:

    1. Σ_k v_k = U diag(σ) Vᵀ; its r − K·t largest components are the common ones, U_c, σ_c, V_c.
    2. v_k − U_c U_cᵀ v_k, each task's part outside of them: its t largest components U_k, σ_k, V_k.
    3. U = [U_1 … U_K, U_c] and V likewise are replaced by the nearest matrices with orthonormal columns, U⊥ and V⊥.
    4. τ = scale · mean(σ_1 … σ_K, σ_c) · U⊥ V⊥ᵀ.

    Directions that are only rounding are left out, also of the mean. Tensors that are not matrices are averaged; the
    released code averages convolutions and stacked experts too.

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
        models, size = len(matrices), min(matrices.shape[1:])
        own = round((size - int(size * self.common)) / models)
        merge = _merge_wide if matrices.shape[1] <= matrices.shape[2] else _merge_tall
        return merge(matrices, max(0, size - models * own), own)


def _merge_wide(matrices: Tensor, common: int, own: int) -> Tensor:
    """Merge (K, m, n) with m ≤ n. The part outside of U_c is represented in its own few coordinates."""
    tolerance = rounding(*matrices.shape[1:])
    total = weighted_sum(matrices, 1.0)
    directions, values = left_spectrum(total, -1.0)  # relative to all m directions
    common = min(common, int((values > tolerance * values[:1]).sum()))
    if not len(values):  # the tasks cancel out
        directions = torch.eye(len(total), dtype=torch.float64, device=total.device)
    directions = directions.to(total.dtype)
    side, outside = directions[:, :common], directions[:, common:]
    values = values[:common].to(total.dtype)
    rows = (side / values).T @ total

    def find(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inner = outside.T @ matrix
        left, spectrum, right = leading_components(inner, min(own, len(inner)), _floor(tolerance, matrix, inner))
        return outside @ left, spectrum, right

    return _joined([*each(find, list(matrices)), (side, values, rows)], total)


def _merge_tall(matrices: Tensor, common: int, own: int) -> Tensor:
    """Merge (K, m, n) with m > n, by the transposes: components (n, r), (r,), (r, m)."""
    tolerance = rounding(*matrices.shape[1:])
    total = weighted_sum(matrices, 1.0).T
    side, values, rows = leading_components(total, common, tolerance)

    def find(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rest = torch.addmm(matrix.T, matrix.T @ rows.T, rows, alpha=-1)
        return leading_components(rest, own, _floor(tolerance, matrix, rest))

    return _joined([*each(find, list(matrices)), (side, values, rows)], total).T


def _floor(tolerance: float, matrix: Tensor, rest: Tensor) -> float:
    """The tolerance for the rest of a matrix: the whole matrix's rounding must not count as a direction of the rest."""
    whole, left = (float(torch.linalg.vector_norm(part)) for part in (matrix, rest))
    return tolerance * max(1.0, whole / left) if left else tolerance


def _joined(components: list[tuple[Tensor, Tensor, Tensor]], like: Tensor) -> Tensor:
    """Components side by side, orthogonalized, with a flat spectrum."""
    sides, spectra, longs = zip(*components, strict=True)
    short, spectrum, long = torch.cat(sides, dim=1), torch.cat(spectra), torch.cat(longs)
    if not len(spectrum):
        return torch.zeros_like(like)
    for factor in (short, long):
        to_nearest_isometry_(factor, rounding(*factor.shape))
    return short.mul_(spectrum.mean()) @ long
