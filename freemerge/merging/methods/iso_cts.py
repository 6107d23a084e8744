"""Iso-CTS: isotropic merging in common and task-specific subspaces (Marczak et al., ICML 2025, arXiv 2502.04959)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from freemerge.merging.methods.base import require, require_number, weighted_sum
from freemerge.merging.methods.matrices import MatrixMethod
from freemerge.runtime.threads import each
from freemerge.tensors.panels import gram
from freemerge.tensors.spectra import (
    exact_products,
    extend_to_isometry_,
    leading_components,
    leading_directions,
    left_spectrum,
    rounding,
    to_nearest_isometry_,
    turned,
)

_LEAST = 0.03  # fraction of the largest singular value
_Components = tuple[Tensor, Tensor, Tensor]  # U, σ, Vᵀ, of which U has the shorter side


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
    outside = directions[:, common:].to(total.dtype)

    def find(matrix: Tensor) -> _Components:
        inner = outside.T @ matrix
        left, spectrum, right = leading_components(inner, min(own, len(inner)), _floor(tolerance, matrix, inner))
        return outside @ left, spectrum, right

    shared = _Shared(total, directions[:, :common], values[:common])
    del total  # as large as a task vector; it is computed again where it is needed
    return _joined(each(find, list(matrices)), shared, lambda: weighted_sum(matrices, 1.0))


def _merge_tall(matrices: Tensor, common: int, own: int) -> Tensor:
    """Merge (K, m, n) with m > n, by the transposes: components (n, r), (r,), (r, m)."""
    tolerance = rounding(*matrices.shape[1:])
    total = weighted_sum(matrices, 1.0).T
    directions, values = left_spectrum(total, tolerance)
    shared = _Shared(total, directions[:, :common], values[:common])
    del total
    rows = shared.rows

    def find(matrix: Tensor) -> _Components:
        """Components of v_kᵀ (1 − U_c U_cᵀ), (n, m), which is formed only if its Gram matrix is not exact enough."""
        inside = rows @ matrix  # U_cᵀ v_k, (r, n)
        rest = gram(matrix.T)
        before = float(rest.diagonal().sum())
        rest -= gram(inside.T)
        after = float(rest.diagonal().sum())
        found = None
        if 0 < own <= len(rest) // 2 and after > 0:
            found = leading_directions(rest, own, tolerance, error=max(1.0, before / after))
        if found is None:
            outside = torch.addmm(matrix.T, inside.T, rows, alpha=-1)
            return leading_components(outside, own, _floor(tolerance, matrix, outside))
        outside = torch.addmm((matrix @ found).T, (inside @ found).T, rows, alpha=-1)  # (t, m)
        return turned(found, outside)

    return _joined(each(find, list(matrices)), shared, lambda: weighted_sum(matrices, 1.0).T).T


def _floor(tolerance: float, matrix: Tensor, rest: Tensor) -> float:
    """The tolerance for the rest of a matrix: the whole matrix's rounding must not count as a direction of the rest."""
    whole, left = (float(torch.linalg.vector_norm(part)) for part in (matrix, rest))
    return tolerance * max(1.0, whole / left) if left else tolerance


class _Shared:
    """The common components of the sum of the task vectors.

    Args:
        total: the sum, (s, l) float32 with s ≤ l.
        side: the common directions of the shorter side, (s, r) float64.
        values: their singular values, (r,) float64.
    """

    def __init__(self, total: Tensor, side: Tensor, values: Tensor) -> None:
        self.side, self.values = side, values
        self.rows = (side / values).to(total.dtype).T @ total  # those of the longer side, (r, l)

    @property
    def exact(self) -> bool:
        """Whether the rows are orthonormal up to float32 rounding, which grows with σ_1/σ_r."""
        return len(self.values) == 0 or float(self.values[-1]) > _LEAST * float(self.values[0])

    def products(self, short: Tensor, long: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Products of task-specific directions, (t, s) and (t, l), with themselves and the common ones, in float64."""
        with_rows = exact_products(long, total) @ (self.side / self.values)  # more exact than those with `rows`
        return (
            torch.cat([exact_products(short, short), short.to(self.side.dtype) @ self.side], dim=1),
            torch.cat([exact_products(long, long), with_rows], dim=1),
        )


def _joined(components: list[_Components], shared: _Shared, total: Callable[[], Tensor]) -> Tensor:
    """Components side by side, orthogonalized, with a flat spectrum; `total` computes the sum of the task vectors."""
    sides, spectra, longs = zip(*components, strict=True)
    spectrum = torch.cat([*spectra, shared.values.to(shared.rows.dtype)])
    if not len(spectrum):
        return torch.zeros_like(total())
    own, own_rows = torch.cat(sides, dim=1).T, torch.cat(longs)
    short, long = torch.cat([own, shared.side.T.to(own.dtype)]), torch.cat([own_rows, shared.rows])
    short_products, long_products = shared.products(own, own_rows, total())
    extend_to_isometry_(short, short_products, rounding(*short.shape))
    if shared.exact:
        extend_to_isometry_(long, long_products, rounding(*long.shape))
    else:
        to_nearest_isometry_(long, rounding(*long.shape))
    return short.mul_(spectrum.mean()).T @ long
