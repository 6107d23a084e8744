"""Weighted sums of covariances of matrix rows, S = Σ_k w_k W_kᵀW_k, and products with their inverse, B S⁻¹.

A covariance has the square of a matrix's number of columns as its size, which for a wide matrix is several times the
matrix itself. So at most one is held, as a triangle (see `panels`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from freemerge.runtime.pages import fresh
from freemerge.runtime.threads import each, load_linalg
from freemerge.tensors.panels import Panels, column_parts, gram

_NEARLY_SQUARE = 1.5  # ratio of columns to rows up to which W (WᵀW) takes less arithmetic than (W Wᵀ) W and WᵀW


def add_covariances(matrices: Tensor, weights: Sequence[float], covariance: Panels) -> None:
    """S += Σ_k w_k W_kᵀ W_k.

    Args:
        matrices: W, (K, m, n) float32.
        weights: w, K of them.
        covariance: S, (n, n).
    """

    def add(part: slice, panel: Tensor) -> None:
        for matrix, weight in zip(matrices, weights, strict=True):
            panel.addmm_(matrix[:, part.start :].T, matrix[:, part], alpha=weight)

    covariance.fill(add)


def add_both(matrices: Tensor, weights: Sequence[float], covariance: Panels) -> Tensor:
    """S += Σ_k w_k W_kᵀ W_k, and B = Σ_k w_k W_k W_kᵀ W_k.

    Args:
        matrices: W, (K, m, n) float32.
        weights: w, K of them.
        covariance: S, (n, n).

    Returns:
        B, (m, n) float32.
    """
    _, rows, columns = matrices.shape
    products = fresh((rows, columns), matrices.dtype, matrices.device).zero_()
    narrow = columns <= _NEARLY_SQUARE * rows
    if not narrow:
        add_covariances(matrices, weights, covariance)
    for matrix, weight in zip(matrices, weights, strict=True):
        own = gram(matrix.T if narrow else matrix)
        if narrow:
            _add(own, weight, covariance)
        left, right = (matrix, own) if narrow else (own, matrix)
        _add_products(left, right, weight, products)
    return products


def _add(own: Tensor, weight: float, covariance: Panels) -> None:
    """S += w C for a whole symmetric matrix."""
    covariance.fill(lambda part, panel: panel.add_(own[part.start :, part], alpha=weight))


def _add_products(left: Tensor, right: Tensor, weight: float, products: Tensor) -> None:
    """B += w L R, by rows in parallel."""
    each(lambda part: products[part].addmm_(left[part], right, alpha=weight), column_parts(len(products), left.device))


def sum_covariances(matrices: Tensor, weights: Sequence[float]) -> Tensor:
    """S, (n, n) float32, as a whole matrix; see `add_covariances`."""
    covariance = _whole(matrices)
    add_covariances(matrices, weights, covariance)
    return covariance.full()


def sum_both(matrices: Tensor, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """B and S, (m, n) and (n, n) float32, as whole matrices; see `add_both`."""
    covariance = _whole(matrices)
    return add_both(matrices, weights, covariance), covariance.full()


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


def _whole(matrices: Tensor) -> Panels:
    """Zeros for a covariance of the columns of (K, m, n) that becomes a whole matrix."""
    columns = matrices.shape[2]
    return Panels(columns, matrices.device, fresh((columns, columns), matrices.dtype, matrices.device))
