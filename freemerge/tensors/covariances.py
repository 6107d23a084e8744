"""Weighted sums of covariances of matrix rows, S = Σ_k w_k W_kᵀW_k, and products with their inverse, B S⁻¹.

A covariance has the square of a matrix's number of columns as its size, which for a wide matrix is several times the
matrix itself. So at most one is held, with its Cholesky factor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from freemerge.runtime.pages import fresh
from freemerge.runtime.threads import each, load_linalg

_BLOCK = 512  # rows or columns at a time: large enough for a fast product, small enough to skip the symmetric half


def sum_covariances(matrices: Tensor, weights: Sequence[float]) -> Tensor:
    """S = Σ_k w_k W_kᵀ W_k.

    Args:
        matrices: W, (K, m, n) float32.
        weights: w, K of them.

    Returns:
        (n, n) float32, symmetric.
    """
    columns = matrices.shape[2]
    total = fresh((columns, columns), matrices.dtype, matrices.device).zero_()

    def add(part: slice) -> None:  # from the diagonal downwards; the upper half follows by symmetry
        for matrix, weight in zip(matrices, weights, strict=True):
            total[part.start :, part].addmm_(matrix[:, part.start :].T, matrix[:, part], alpha=weight)

    parts = _parts(columns)
    each(add, parts)
    for part in parts:
        total[part, part.stop :] = total[part.stop :, part].T
    return total


def sum_both(matrices: Tensor, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """B and S, see `sum_products` and `sum_covariances`.

    Args:
        matrices: W, (K, m, n) float32.
        weights: w, K of them.

    Returns:
        (m, n) and (n, n) float32.
    """
    _, rows, columns = matrices.shape
    if rows <= columns:
        return sum_products(matrices, weights), sum_covariances(matrices, weights)
    products = fresh((rows, columns), matrices.dtype, matrices.device).zero_()
    total = fresh((columns, columns), matrices.dtype, matrices.device).zero_()

    def add(part: slice) -> None:  # the covariance is smaller than W Wᵀ, and serves for both
        for matrix, weight in zip(matrices, weights, strict=True):
            own = matrix.T @ matrix[:, part]
            products[:, part].addmm_(matrix, own, alpha=weight)
            total[:, part].add_(own, alpha=weight)

    each(add, _parts(columns))
    return products, total


def sum_products(matrices: Tensor, weights: Sequence[float]) -> Tensor:
    """B = Σ_k w_k W_k W_kᵀ W_k.

    Args:
        matrices: W, (K, m, n) float32.
        weights: w, K of them.

    Returns:
        (m, n) float32.
    """
    total = fresh(matrices.shape[1:], matrices.dtype, matrices.device).zero_()

    def add(part: slice) -> None:
        for matrix, weight in zip(matrices, weights, strict=True):
            total[part].addmm_(matrix[part] @ matrix.T, matrix, alpha=weight)

    each(add, _parts(matrices.shape[1]))
    return total


def divide(products: Tensor, covariance: Tensor, workspace: Tensor | None = None) -> Tensor:
    """X = B S⁻¹, or B S⁺ where S is singular: the X that solves X S = B.

    Args:
        products: B, (R, n) float32.
        covariance: S, (n, n) float32, symmetric and positive semidefinite.
        workspace: float32 memory that may be overwritten; the Cholesky factor is stored there if it fits.

    Returns:
        (R, n) float32.
    """
    load_linalg(covariance.device)
    out = None
    if workspace is not None and workspace.is_contiguous() and workspace.numel() >= covariance.numel():
        factor = workspace.view(-1)[: covariance.numel()].view(covariance.shape).mT  # column-major, as LAPACK expects
        out = (factor, torch.empty((), dtype=torch.int32, device=covariance.device))
    factor, failed = torch.linalg.cholesky_ex(covariance, out=out)
    if not bool(failed):
        return torch.cholesky_solve(products.T, factor).T
    del factor
    return products @ pseudo_inverse(covariance).to(products.dtype)


def pseudo_inverse(covariance: Tensor) -> Tensor:
    """S⁺ of a symmetric positive semidefinite matrix.

    Args:
        covariance: (n, n) float32. Eigenvalues at the level of float32 rounding, ≤ n·ε·λ_max, count as zero.

    Returns:
        (n, n) float64.
    """
    load_linalg(covariance.device)
    values, directions = torch.linalg.eigh(covariance.double())
    kept = values > len(values) * torch.finfo(torch.float32).eps * values[-1].clamp(min=0)
    directions = directions[:, kept]
    return (directions / values[kept]) @ directions.T


def _parts(size: int) -> list[slice]:
    """Ranges of rows or columns, one for each thread's job."""
    return [slice(start, min(start + _BLOCK, size)) for start in range(0, size, _BLOCK)]
