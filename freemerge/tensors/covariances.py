"""Sums of weighted covariances of matrices' rows, and what is divided by them: Σ_k w_k W_kᵀW_k, and B S⁻¹.

Both are as large as the square of a matrix's columns, which for a wide matrix is several times the matrix itself. So no
more than one of them is held, with its Cholesky factor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from freemerge.runtime.pages import fresh
from freemerge.runtime.threads import each, load_linalg, team_size

_BLOCK = 256  # rows and columns that a thread has at least


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

    def add(part: slice) -> None:  # from the diagonal on downwards; what is above follows
        for matrix, weight in zip(matrices, weights, strict=True):
            total[part.start :, part].addmm_(matrix[:, part.start :].T, matrix[:, part], alpha=weight)

    parts = _parts(columns)
    each(add, parts)
    for part in parts:
        total[part, part.stop :] = total[part.stop :, part].T
    return total


def sum_products(matrices: Tensor, weights: Sequence[float]) -> Tensor:
    """B = Σ_k w_k W_k W_kᵀ W_k.

    Args:
        matrices: W, (K, m, n) float32.
        weights: w, K of them.

    Returns:
        (m, n) float32.
    """
    total = fresh(matrices.shape[1:], matrices.dtype, matrices.device).zero_()
    if matrices.shape[1] > matrices.shape[2]:  # the covariance is smaller than W Wᵀ

        def add(part: slice) -> None:
            for matrix, weight in zip(matrices, weights, strict=True):
                total[:, part].addmm_(matrix, matrix.T @ matrix[:, part], alpha=weight)
    else:

        def add(part: slice) -> None:
            for matrix, weight in zip(matrices, weights, strict=True):
                total[part].addmm_(matrix[part] @ matrix.T, matrix, alpha=weight)

    each(add, _parts(min(matrices.shape[1:])))
    return total


def divide(products: Tensor, covariance: Tensor) -> Tensor:
    """X = B S⁻¹, or B S⁺ where S is singular: the X that solves X S = B.

    Args:
        products: B, (R, n) float32.
        covariance: S, (n, n) float32, symmetric and positive semidefinite; overwritten.

    Returns:
        (R, n) float32.
    """
    load_linalg(covariance.device)
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not bool(failed):
        return torch.cholesky_solve(products.T, factor).T
    del factor
    return products @ pseudo_inverse(covariance).to(products.dtype)


def pseudo_inverse(covariance: Tensor) -> Tensor:
    """S⁺ of a symmetric positive semidefinite matrix.

    Args:
        covariance: (n, n) float32. Directions with eigenvalues of float32's rounding, ≤ n·ε·λ_max, count as empty.

    Returns:
        (n, n) float64.
    """
    load_linalg(covariance.device)
    values, directions = torch.linalg.eigh(covariance.double())
    kept = values > len(values) * torch.finfo(torch.float32).eps * values[-1].clamp(min=0)
    directions = directions[:, kept]
    return (directions / values[kept]) @ directions.T


def _parts(size: int) -> list[slice]:
    """Rows or columns for threads to share."""
    step = max(_BLOCK, -(-size // (2 * team_size())))
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
