"""Singular values and directions of a matrix, from the eigenvalues of its Gram matrix in float64.

Only the singular vectors of the shorter side are computed; the others follow from them. That takes a fraction of the
memory of torch's singular value decomposition, and a third of its time for a long matrix. Squaring loses half of
float64's digits, which still leaves more than float32 has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from freemerge.runtime.threads import each, load_linalg
from freemerge.tensors.panels import column_parts, gram

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
    squares, directions = torch.linalg.eigh(_exact_gram(matrix))  # smallest first
    values = squares.clamp(min=0).sqrt()
    rank = int((values > values[-1] * tolerance).sum())
    return directions[:, len(values) - rank :].flip(1), values[len(values) - rank :].flip(0)


def _exact_gram(matrix: Tensor) -> Tensor:
    """A Aᵀ of (m, n) float32, in float64: (m, m), of which only the lower triangle is computed."""
    total = torch.zeros(len(matrix), len(matrix), dtype=torch.float64, device=matrix.device)
    for block in _blocks(matrix):
        block = block.to(torch.float64)
        for part in column_parts(len(matrix), matrix.device):
            total[part.start :, part].addmm_(block[part.start :], block[part].T)
    return total


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
        directions = leading_directions(gram(matrix), rank, tolerance)
    if directions is None:
        directions, values = (part[..., :rank].to(matrix.dtype) for part in left_spectrum(matrix, tolerance))
        return directions, values, directions.div(values).T @ matrix
    return turned(directions, directions.T @ matrix)


def turned(directions: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The components U, σ, Vᵀ of D R, the part of a matrix in a few directions, largest first.

    Args:
        directions: D, (m, r) float32, orthonormal.
        rows: R, (r, n) float32, r ≤ n.
    """
    turns, values = left_spectrum(rows, 0.0)
    turns, values = turns.to(rows.dtype), values.to(rows.dtype)
    return directions @ turns, values, (turns / values).T @ rows


def leading_directions(products: Tensor, rank: int, tolerance: float, error: float = 1.0) -> Tensor | None:
    """The directions of the r largest eigenvalues of a Gram matrix, if float32 determines their subspace.

    Args:
        products: A Aᵀ, (m, m) float32, of which the lower triangle is read.
        rank: r, at least 1.
        tolerance: directions with σ ≤ tolerance · σ_max count as rounding.
        error: the rounding of the Gram matrix, in multiples of its own: more than 1 if it is a difference.

    Returns:
        (m, r), in ascending order; None if one of the directions might be affected by rounding.
    """
    load_linalg(products.device)
    squares, found = torch.linalg.eigh(products)
    least = max(_LEAST * error, 2 * tolerance**2)
    return found[:, -rank:] if float(squares[-rank]) > least * float(squares[-1]) else None


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
    whitening = gram(directions / values.sqrt()).to(matrix.dtype)  # (A Aᵀ)^(−1/2), (m, m)
    each(lambda block: block.copy_(whitening @ block), _blocks(matrix))
    return values


def extend_to_isometry_(rows: Tensor, products: Tensor, tolerance: float) -> None:
    """Replace rows A = [B; Q], of which those of Q are orthonormal already, by the nearest orthonormal ones, in place.

    A Aᵀ = [B Bᵀ, B Qᵀ; Q Bᵀ, 1] differs from 1 only in the directions of B and those of Q that B touches, at most twice
    as many as B has rows. So a small eigenproblem determines (A Aᵀ)^(−1/2) A.

    Args:
        rows: A, (R, n) float32; overwritten.
        products: [B Bᵀ, B Qᵀ], (rows of B, R) float64. Where B nearly lies in the span of Q, they must be more exact
            than products of float32 rows.
        tolerance: directions with σ ≤ tolerance · σ_max are left out.
    """
    count = len(products)
    if count == 0:
        return
    load_linalg(rows.device)
    own, fixed = rows[:count], rows[count:]
    basis, triangle = torch.linalg.qr(products[:, count:].T)  # B Qᵀ = (basis · triangle)ᵀ
    identity = torch.eye(len(triangle), dtype=products.dtype, device=products.device)
    lower = torch.cat([triangle, identity], dim=1)
    squares, directions = torch.linalg.eigh(torch.cat([torch.cat([products[:, :count], triangle.T], dim=1), lower]))
    kept = squares.clamp(min=0).sqrt() > tolerance * squares[-1].sqrt()
    change = gram(directions[:, kept] / squares[kept] ** 0.25)  # what (A Aᵀ)^(−1/2) is more than 1
    change.diagonal().sub_(1)
    change, basis = change.to(rows.dtype), basis.to(rows.dtype)

    def extend(columns: slice) -> None:
        changes = change @ torch.cat([own[:, columns], basis.T @ fixed[:, columns]])
        own[:, columns] += changes[:count]
        fixed[:, columns].addmm_(basis, changes[count:])

    each(extend, column_parts(rows.shape[1], rows.device))


def exact_products(left: Tensor, right: Tensor) -> Tensor:
    """A Bᵀ of (a, n) and (b, n) float32, in float64: (a, b)."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for one, other in zip(_blocks(left), _blocks(right), strict=True):
        total.addmm_(one.to(total.dtype), other.to(total.dtype).T)
    return total


def _blocks(matrix: Tensor) -> list[Tensor]:
    """Views of a few columns of (m, n) each."""
    return [matrix[:, columns] for columns in column_parts(matrix.shape[1], matrix.device)]


def rounding(rows: int, columns: int) -> float:
    """Approximate upper bound of the norm of a matrix's float32 rounding errors, relative to the norm of the matrix."""
    return torch.finfo(torch.float32).eps * (rows**0.5 + columns**0.5)
