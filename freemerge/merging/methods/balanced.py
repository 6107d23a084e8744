"""Balanced merging: parameter competition balancing with matrices as weights, for rows and columns at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from freemerge.merging.methods.base import require, require_number, weighted_sum
from freemerge.merging.methods.matrices import MatrixMethod, is_embedding
from freemerge.runtime.threads import load_linalg
from freemerge.tensors.covariances import sum_covariances

_SOLVED = 1e-12  # of the first squared residual: what is left is rounding


@dataclass(frozen=True)
class BalancedMerging(MatrixMethod):
    """Balance the tasks' competition for the rows and the columns of each matrix. One pass.

    PCB-Merging balances each entry by itself, τ = (Σ_k w_k·v_k)/(Σ_k w_k): the task for which an entry is important
    decides. Here the weights are matrices, which know the directions that a task uses, and not only its entries. With

        G_k = v_k v_kᵀ/‖v_k‖² + (ridge/m)·1, (m, m),   A_k = v_kᵀ v_k/‖v_k‖² + (ridge/n)·1, (n, n),

    estimates of the covariances of the layer's output gradients and of its inputs (rows and columns of a task vector
    lie in their spans), τ minimizes Σ_k ‖G_k^½ (τ − v_k) A_k^½‖². It solves

        Σ_k G_k τ A_k = Σ_k G_k v_k A_k,

    with the balance of ACE-Merging as the special case G_k = 1. A few steps of conjugate gradients from the mean of the
    task vectors suffice, preconditioned by (Σ_k G_k)⁻¹ and (Σ_k A_k)⁻¹. FR-Merging's alignment comes first, so that no
    task loses for its smaller norm.

    Embeddings and tensors that are not matrices are averaged. The equation is that of merging with Fisher information
    in Kronecker factors (Tam et al., TMLR 2024, arXiv 2312.04339), which takes the factors from data. Sources of the
    parts: PCB-Merging (arXiv 2410.02396), FREE-Merging (arXiv 2411.16815), ACE-Merging (arXiv 2603.02945).

    Args:
        scale: multiplies the result.
        filter: see `MatrixMethod`.
        align: see `MatrixMethod`.
        ridge: regularizes the covariances, in units of their mean eigenvalue; positive.
        steps: steps of conjugate gradients, at least 1.
    """

    linear_in_scale: ClassVar = True

    align: bool = True
    ridge: float = 0.1
    steps: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "ridge", self.ridge)
        require(self.ridge > 0, self, f"`ridge` must be positive, got {self.ridge}")
        whole = isinstance(self.steps, int) and not isinstance(self.steps, bool) and self.steps > 0
        require(whole, self, f"`steps` must be a positive integer, got {self.steps!r}")

    @property
    def duplicates(self) -> bool:
        return True  # for G_k, on the shorter side, and Σ_k A_k on the longer side with its factor

    def is_merged(self, name: str) -> bool:
        return not is_embedding(name)

    def combine_matrix(self, name: str, matrices: Tensor) -> Tensor:
        norms = [float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) for matrix in matrices]
        active = [index for index, norm in enumerate(norms) if norm > 0]  # a model that did not change takes no part
        if not active:
            return torch.zeros_like(matrices[0])
        vectors = matrices if len(active) == len(matrices) else matrices[active]
        tall = vectors.shape[1] > vectors.shape[2]
        weights = [norms[index] ** -2 for index in active]
        merged = _System(vectors.mT if tall else vectors, weights, self.ridge).solve(self.steps)
        return merged.T if tall else merged


class _System:
    """The equations Σ_k G_k τ A_k = Σ_k G_k v_k A_k of one matrix, with s ≤ l.

    G_k X A_k is computed as (G_k X v_kᵀ) v_k/‖v_k‖² + (ridge/l)·G_k X: two thin products for each task, instead of K
    matrices of size (l, l).

    Args:
        vectors: v_k, (K, s, l) float32.
        weights: 1/‖v_k‖².
        ridge: see `BalancedMerging`.
    """

    def __init__(self, vectors: Tensor, weights: list[float], ridge: float) -> None:
        models, short, long = vectors.shape
        self.vectors, self.weights = vectors, weights
        self.short_ridge, self.long_ridge = ridge / short, ridge / long
        self.rows = [(vector @ vector.T).mul_(weight) for vector, weight in zip(vectors, weights, strict=True)]
        for own in self.rows:
            own.diagonal().add_(self.short_ridge)  # G_k, (s, s)
        self.total = sum(self.rows[1:], self.rows[0])  # Σ_k G_k
        columns = sum_covariances(vectors, weights)
        columns.diagonal().add_(models * self.long_ridge)  # Σ_k A_k, (l, l)
        load_linalg(vectors.device)
        self.factors = torch.linalg.cholesky(self.total), torch.linalg.cholesky(columns)

    def solve(self, steps: int) -> Tensor:
        """τ, (s, l) float32, after some steps of preconditioned conjugate gradients from the mean of the v_k."""
        merged = weighted_sum(self.vectors, 1 / len(self.vectors))
        residual = self._residual(merged)
        direction = torch.zeros_like(merged)
        before = least = 0.0
        for _ in range(steps):
            other = self._precondition(residual)
            product = _dot(residual, other)
            if product <= least:  # solved
                break
            least = least or product * _SOLVED
            direction.mul_(product / before if before else 0.0).add_(other)
            before = product
            self._apply(direction, other)
            step = product / _dot(direction, other)
            merged.add_(direction, alpha=step)
            residual.sub_(other, alpha=step)
        return merged

    def _precondition(self, matrix: Tensor) -> Tensor:
        """(Σ_k G_k)⁻¹ X (Σ_k A_k)⁻¹, in new memory."""
        rows, columns = self.factors
        return torch.cholesky_solve(torch.cholesky_solve(matrix, rows).T, columns).T.contiguous()

    def _residual(self, merged: Tensor) -> Tensor:
        """Σ_k G_k (v_k − τ) A_k."""
        residual = torch.zeros_like(merged)
        for vector, weight, own in zip(self.vectors, self.weights, self.rows, strict=True):
            inner = torch.addmm(own, merged, vector.T, alpha=-weight)  # G_k − τ v_kᵀ/‖v_k‖²
            inner.diagonal().add_(self.long_ridge - self.short_ridge)
            residual.addmm_(own @ inner, vector)
        return residual.addmm_(self.total, merged, alpha=-self.long_ridge)

    def _apply(self, matrix: Tensor, out: Tensor) -> None:
        """Σ_k G_k X A_k."""
        torch.mm(self.total, matrix, out=out).mul_(self.long_ridge)
        for vector, weight, own in zip(self.vectors, self.weights, self.rows, strict=True):
            out.addmm_(own @ (matrix @ vector.T), vector, alpha=weight)


def _dot(left: Tensor, right: Tensor) -> float:
    """⟨X, Y⟩ of two contiguous matrices."""
    return float(torch.dot(left.view(-1), right.view(-1)))
