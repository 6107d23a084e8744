"""A matrix as the product of two small ones: its truncated singular value decomposition.

The best approximation of rank r (Eckart and Young, 1936) keeps the r largest singular values. Where the full
decomposition would be slow, it is computed in a subspace found by a few multiplications with the matrix and its
transpose (Halko, Martinsson and Tropp, SIAM Review 2011, arXiv 0909.4061, algorithms 4.4 and 5.1): subspace iteration
until another iteration gains nothing. A matrix of rank at most r is reproduced exactly, up to rounding. torch's
`svd_lowrank` runs a fixed number of iterations and gives no such accuracy, so this stays our own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from freemerge.runtime.threads import load_linalg

_SMALL = 256  # up to this smaller side the full decomposition is fast
_OVERSAMPLING = 16
_GAIN = 1e-3  # fraction of the remaining energy: an iteration that captures less of it is the last
_NOISE = 1e-7  # fraction of the total energy that float32 cannot resolve
_ITERATIONS = 24


class Factors(NamedTuple):
    """Factors whose product left @ right approximates a matrix; both contain the singular values' square roots."""

    left: Tensor  # (m, r) float32
    right: Tensor  # (r, n) float32


def factorize(matrix: Tensor, rank: int) -> Factors:
    """Factor the matrix of rank at most r that is nearest to a given one in the Frobenius norm.

    Args:
        matrix: (m, n) float32.
        rank: r; limited to the number of rows and of columns.

    Returns:
        The factors, with min(r, m, n) columns and rows. The same matrix gives the same factors.
    """
    load_linalg(matrix.device)
    rank = min(rank, *matrix.shape)
    width = rank + max(_OVERSAMPLING, rank // 4)
    if min(matrix.shape) <= max(_SMALL, 2 * width):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, vh = _decompose_subspace(matrix, rank, width)
    roots = s[:rank].sqrt()
    return Factors(u[:, :rank] * roots, roots[:, None] * vh[:rank])


def _decompose_subspace(matrix: Tensor, rank: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular vectors and values; the first `rank` of them are accurate."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
    basis, _ = torch.linalg.qr(matrix @ start)
    captured, total = 0.0, float(matrix.square().sum(dtype=torch.float64))
    for _ in range(_ITERATIONS):
        inner = basis.T @ matrix  # (width, n)
        energy = float(torch.linalg.svdvals(inner @ inner.T)[:rank].sum())
        if energy - captured <= max(_GAIN * (total - energy), _NOISE * total):
            break
        captured = energy
        directions, _ = torch.linalg.qr(inner.T)
        basis, _ = torch.linalg.qr(matrix @ directions)
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, vh


def squared_error(matrix: Tensor, left: Tensor, right: Tensor) -> float:
    """‖matrix − left @ right‖², the squares summed in float64.

    Args:
        matrix: (m, n) float32.
        left: (m, r), in any floating-point dtype.
        right: (r, n).
    """
    rest = torch.addmm(matrix, left.float(), right.float(), alpha=-1)
    return float(rest.square_().sum(dtype=torch.float64))
