"""Singular values and directions of a matrix, from the eigenvalues of its Gram matrix in float64.

Only the singular vectors of the shorter side are computed; the others follow from them. That takes a fraction of the
memory of torch's singular value decomposition, and a third of its time for a long matrix. Squaring loses half of
float64's digits, which still leaves more than float32 has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from freemerge.runtime.threads import load_linalg
from freemerge.tensors.chunks import at_a_time

_COLUMNS = 256  # columns that are processed at a time
_LEAST = 1e-3  # fraction of the largest eigenvalue of a float32 Gram matrix that stands out from its rounding


def left_spectrum(matrix: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """U and σ of a wide matrix A = U diag(σ) Vᵀ; V is then Aᵀ U diag(1/σ).

    Args:
        matrix: A, (m, n) float32, m ≤ n.
        tolerance: directions with σ ≤ tolerance · σ_max are left out; values below about 1e-7 cannot be distinguished
            from 0.

    Returns:
        (m, r) and (r,) float64, largest first; r is 0 for a matrix of zeros.
    """
    load_linalg(matrix.device)
    gram = torch.zeros(len(matrix), len(matrix), dtype=torch.float64, device=matrix.device)
    for block in _blocks(matrix):
        block = block.to(torch.float64)
        gram.addmm_(block, block.T)
    squares, directions = torch.linalg.eigh(gram)  # smallest first
    del gram
    values = squares.clamp(min=0).sqrt()
    rank = int((values > values[-1] * tolerance).sum())
    return directions[:, len(values) - rank :].flip(1), values[len(values) - rank :].flip(0)


def leading_components(matrix: Tensor, rank: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """The largest components U, σ, Vᵀ of a wide matrix A = U diag(σ) Vᵀ.

    If all of them are large, σ_r > 0.03·σ_1, their subspace is found from the Gram matrix in float32, as accurately as
    by a singular value decomposition in float32, up to a factor of σ_1/(2σ_r). Values and directions within it are then
    computed in float64. That takes half the time of `left_spectrum`, which handles all other cases.

    Args:
        matrix: A, (m, n) float32, m ≤ n.
        rank: r, the largest number of components.
        tolerance: see `left_spectrum`.

    Returns:
        (m, r), (r,) and (r, n) float32, largest first.
    """
    rank = min(rank, len(matrix))
    if rank == 0:
        return matrix[:, :0].clone(), matrix[:0, 0].clone(), matrix[:0].clone()
    directions = None
    if 2 * rank <= len(matrix):
        load_linalg(matrix.device)
        squares, found = torch.linalg.eigh(matrix @ matrix.T)
        if float(squares[-rank]) > max(_LEAST, 2 * tolerance**2) * float(squares[-1]):
            directions = found[:, -rank:]
    if directions is None:
        directions, values = (part[..., :rank].to(matrix.dtype) for part in left_spectrum(matrix, tolerance))
        return directions, values, directions.div(values).T @ matrix
    rows = directions.T @ matrix
    turns, values = left_spectrum(rows, 0.0)
    turns = turns.to(matrix.dtype)
    values = values.to(matrix.dtype)
    return directions @ turns, values, (turns / values).T @ rows


def components(matrix: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition U, σ, Vᵀ of a matrix of any shape, (m, n) float32; see `left_spectrum`.

    Returns:
        (m, r), (r,) and (r, n) float32, largest first.
    """
    if matrix.shape[0] <= matrix.shape[1]:
        return leading_components(matrix, len(matrix), tolerance)
    side, values, rows = leading_components(matrix.T, matrix.shape[1], tolerance)
    return rows.T, values, side.T


def left_basis(matrix: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """U and σ of a matrix of any shape, (m, n) float32; U has orthonormal columns even where σ is small.

    Returns:
        (m, r) and (r,) float32, largest first.
    """
    left, values, _ = components(matrix, tolerance)
    if matrix.shape[0] > matrix.shape[1] and len(values):  # U follows from V, less accurately for smaller σ
        basis, triangle = torch.linalg.qr(left)
        left = basis * triangle.diagonal().sign()
    return left, values


def to_nearest_isometry_(matrix: Tensor, tolerance: float) -> Tensor:
    """Replace a matrix A = U diag(σ) Vᵀ by U Vᵀ, in place.

    Args:
        matrix: A, (m, n) float32; overwritten.
        tolerance: directions with σ ≤ tolerance · σ_max are left out.

    Returns:
        σ, (r,) float64, largest first.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return to_nearest_isometry_(matrix.T, tolerance)
    directions, values = left_spectrum(matrix, tolerance)
    whitening = ((directions / values) @ directions.T).to(matrix.dtype)  # (A Aᵀ)^(−1/2), (m, m)
    for block in _blocks(matrix):
        block.copy_(whitening @ block)
    return values


def _blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    """Yield views of a few columns of (m, n) at a time."""
    return matrix.split(at_a_time(_COLUMNS, matrix.device, len(matrix)), dim=1)


def rounding(rows: int, columns: int) -> float:
    """Approximate upper bound of the norm of a matrix's float32 rounding errors, relative to the norm of the matrix."""
    return torch.finfo(torch.float32).eps * (rows**0.5 + columns**0.5)
