"""Balanced merging: parameter competition balancing with matrices as weights, for rows and columns at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from freemerge.errors import MergeError
from freemerge.merging.methods.base import require, require_number, weighted_sum
from freemerge.merging.methods.matrices import MatrixMethod, is_embedding
from freemerge.runtime.threads import each
from freemerge.tensors.covariances import add_covariances
from freemerge.tensors.panels import Panels, column_parts, gram

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

    def extra_copies(self, models: int) -> int:
        return 4  # conjugate gradients' matrices, Σ_k A_k as a triangle for l = 4·s, and a few of size (s, s)

    def is_merged(self, name: str) -> bool:
        return not is_embedding(name)

    def combine_matrix(self, name: str, matrices: Tensor) -> Tensor:
        norms = [float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) for matrix in matrices]
        active = [index for index, norm in enumerate(norms) if norm > 0]  # a model that did not change takes no part
        if not active:
            return torch.zeros_like(matrices[0])
        for place, index in enumerate(active):
            if place != index:
                matrices[place] = matrices[index]
        vectors = matrices[: len(active)]
        tall = vectors.shape[1] > vectors.shape[2]
        system = _System(vectors.mT if tall else vectors, [norms[index] ** -2 for index in active], self.ridge)
        if not system.factorize_():
            raise MergeError(
                f"BalancedMerging: the equations of the tensor '{name}' are singular in float32 with `ridge` "
                f"{self.ridge:g}; give a larger one"
            )
        merged = system.solve(self.steps)
        return merged.T if tall else merged


class _System:
    """The equations Σ_k G_k τ A_k = Σ_k G_k v_k A_k of one matrix, with s ≤ l.

    G_k X A_k is computed as (G_k X v_kᵀ) v_k/‖v_k‖² + (ridge/l)·G_k X: thin products for each task, instead of K
    matrices of size (l, l). G_k is computed again in each step: K of them can be as large as all task vectors.

    Args:
        vectors: v_k, (K, s, l) float32.
        weights: 1/‖v_k‖².
        ridge: see `BalancedMerging`.
    """

    def __init__(self, vectors: Tensor, weights: list[float], ridge: float) -> None:
        models, short, long = vectors.shape
        self.vectors, self.weights = vectors, weights
        self.short_ridge, self.long_ridge = ridge / short, ridge / long
        self.rows, self.columns = Panels(short, vectors.device), Panels(long, vectors.device)
        add_covariances(vectors.mT, weights, self.rows)
        add_covariances(vectors, weights, self.columns)
        self.rows.add_to_diagonal_(models * self.short_ridge)
        self.columns.add_to_diagonal_(models * self.long_ridge)
        self.total = self.rows.full()  # Σ_k G_k, (s, s)
        self.parts = column_parts(short, vectors.device)

    def factorize_(self) -> bool:
        """Factorize Σ_k G_k and Σ_k A_k for the preconditioner; False if one of them is singular."""
        return self.rows.factorize_() and self.columns.factorize_()

    def solve(self, steps: int) -> Tensor:
        """τ, (s, l) float32, after some steps of preconditioned conjugate gradients from the mean of the v_k."""
        merged = weighted_sum(self.vectors, 1 / len(self.vectors))
        residual, direction, other = (torch.zeros_like(merged) for _ in range(3))
        self._add_residual(merged, residual)
        before = least = 0.0
        for _ in range(steps):
            self._precondition_(other.copy_(residual))
            product = _dot(residual, other)
            if product <= least:  # solved
                break
            least = least or product * _SOLVED
            direction.mul_(product / before if before else 0.0).add_(other)
            before = product
            self._add_product(direction, other.zero_())
            step = product / _dot(direction, other)
            merged.add_(direction, alpha=step)
            residual.sub_(other, alpha=step)
        return merged

    def _precondition_(self, matrix: Tensor) -> None:
        """(Σ_k G_k)⁻¹ X (Σ_k A_k)⁻¹, in place."""
        self.columns.divide_(matrix)
        self.rows.divide_(matrix.T)

    def _add_product(self, matrix: Tensor, out: Tensor) -> None:
        """Add Σ_k G_k X A_k to `out`."""
        self._by_rows(lambda part: out[part].addmm_(self.total[part], matrix, alpha=self.long_ridge))
        for vector, weight in zip(self.vectors, self.weights, strict=True):
            inner = self._product(matrix.__getitem__, vector)
            self._add_task(vector, weight, inner.mul_(weight), out)

    def _add_residual(self, merged: Tensor, out: Tensor) -> None:
        """Add Σ_k G_k (v_k − τ) A_k to `out`."""
        self._by_rows(lambda part: out[part].addmm_(self.total[part], merged, alpha=-self.long_ridge))
        for vector, weight in zip(self.vectors, self.weights, strict=True):
            inner = self._product(partial(_difference, vector, merged), vector)
            inner.mul_(weight).diagonal().add_(self.long_ridge)  # of v_k; that of τ is above
            self._add_task(vector, weight, inner, out)

    def _product(self, rows: Callable[[slice], Tensor], vector: Tensor) -> Tensor:
        """X v_kᵀ, (s, s), of a matrix whose rows are computed as they are needed."""
        product = torch.empty_like(self.total)
        self._by_rows(lambda part: torch.mm(rows(part), vector.T, out=product[part]))
        return product

    def _add_task(self, vector: Tensor, weight: float, inner: Tensor, out: Tensor) -> None:
        """Add G_k Y v_k to `out`, with Y (s, s)."""
        own = gram(vector).mul_(weight)
        own.diagonal().add_(self.short_ridge)  # G_k
        self._by_rows(lambda part: out[part].addmm_(own[part] @ inner, vector))

    def _by_rows(self, function: Callable[[slice], object]) -> None:
        """Call a function with ranges of the s rows, in parallel."""
        each(function, self.parts)


def _difference(left: Tensor, right: Tensor, part: slice) -> Tensor:
    return left[part] - right[part]


def _dot(left: Tensor, right: Tensor) -> float:
    """⟨X, Y⟩ of two contiguous matrices."""
    return float(torch.dot(left.view(-1), right.view(-1)))
