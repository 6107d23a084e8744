"""ACE-Merging: merge by input covariances estimated from the task vectors (Xu et al., CVPR 2026, arXiv 2603.02945)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from freemerge.merging.methods.base import require, require_number
from freemerge.merging.methods.matrices import MatrixMethod, is_embedding
from freemerge.tensors.covariances import add_both, divide, pseudo_inverse, sum_both, sum_covariances
from freemerge.tensors.panels import Panels
from freemerge.tensors.spectra import leading_components, rounding

_RIDGE = {"normalized": 0.1, "released": 1e-2}


@dataclass(frozen=True)
class ACEMerging(MatrixMethod):
    """Weigh each task's directions by the covariance of its inputs, estimated from its own task vector. One pass.

    The matrix whose outputs are nearest to those of all tasks is (Σ_k v_k C_k)(Σ_k C_k)⁻¹, with C_k the covariance of
    task k's inputs. Fine-tuning moves rows within the span of the inputs, so C_k can be estimated from the rows of v_k.
    Matrices are (outputs, inputs), as torch's linear layers have them. With v̄_k the mean of the rows and c_k = v_k −
    v̄_k:

    - form "normalized": C_k = c_kᵀc_k/‖c_k‖² + (ridge/n)·1, every task with the same weight, whatever its norm:
      τ = scale · (Σ_k v_k C_k)(Σ_k C_k)⁻¹.
    - form "released", the authors' code. With γ = Var(log ‖v_k‖²)/Mean(log ‖v_k‖²)², norms differ if γ > 0.3. If they
      do not, C_k = c_kᵀc_k + ridge·1; if they do, both terms are divided by ‖c_k‖². With the means of the columns of
      Σ_k c_kᵀc_k as a row a (divided as well, and by Mean ‖v_k‖² too, if norms differ),
      τ₀ = (Σ_k c_k C_k)(Σ_k C_k + 1aᵀ)⁻¹. If norms differ, the ⌊0.3·min(m, n)⌋ largest components U diag(σ) Vᵀ of
      τ₀ + Σ_k v_k (C_k − ridge − Mean_j C_j) are added with a flat spectrum: τ = scale · (τ₀ + mean(σ)·U Vᵀ).

    Embeddings and tensors that are not matrices are averaged.

    Args:
        scale: multiplies the result.
        filter: see `MatrixMethod`.
        align: see `MatrixMethod`.
        form: of the equations, see above.
        ridge: regularizes the covariances; None for 0.1 ("normalized") or the authors' 0.01 ("released", which is in
            units of the squared weights and so depends on how far the models were trained).
    """

    linear_in_scale: ClassVar = True

    form: Literal["normalized", "released"] = "normalized"
    ridge: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.form in _RIDGE, self, f'`form` must be "normalized" or "released", got {self.form!r}')
        if self.ridge is not None:
            require_number(self, "ridge", self.ridge)
            require(self.ridge >= 0, self, f"`ridge` must be at least 0, got {self.ridge}")

    def is_merged(self, name: str) -> bool:
        return not is_embedding(name)

    def combine_matrix(self, name: str, matrices: Tensor) -> Tensor:
        ridge = _RIDGE[self.form] if self.ridge is None else self.ridge
        return (_merge_normalized if self.form == "normalized" else _merge_released)(matrices, ridge)


def _merge_normalized(matrices: Tensor, ridge: float) -> Tensor:
    """(K, m, n) → (m, n); the matrices are overwritten."""
    means = _center_(matrices)
    traces = _squared_norms(matrices)
    weights = [1 / trace if trace > 0 else 0.0 for trace in traces]
    active = [float(trace > 0) for trace in traces]  # a model that did not change has no weight
    if not any(active):
        return means[0].expand(matrices.shape[1:]).clone()
    ridge /= matrices.shape[2]
    covariance = Panels(matrices.shape[2], matrices.device)
    products = add_both(matrices, weights, covariance)
    # v_k C_k = c_k C_k + 1 v̄_k C_k; the second term is the same in all rows.
    row = _mean_products(means, matrices, weights)
    for matrix, mean, own in zip(matrices, means, active, strict=True):
        products.add_(matrix, alpha=own * ridge)
        row.add_(mean, alpha=own * ridge)
    products += row
    covariance.add_to_diagonal_(sum(active) * ridge)
    if covariance.factorize_():
        return covariance.divide_(products)
    singular = sum_covariances(matrices, weights)  # because the ridge is 0, or too small to be seen
    return products @ pseudo_inverse(singular).to(products.dtype)


def _merge_released(matrices: Tensor, ridge: float) -> Tensor:
    """(K, m, n) → (m, n); the matrices are overwritten."""
    models = len(matrices)
    before = torch.tensor(_squared_norms(matrices), dtype=torch.float64)
    logarithms = (before + 1e-12).log()
    differ = models > 1 and bool(logarithms.var() > 0.3 * (logarithms.mean().square() + 1e-12))
    means = _center_(matrices)
    traces = [trace + 1e-12 for trace in _squared_norms(matrices)]
    weights = [1 / trace if differ else 1.0 for trace in traces]
    ridges = [ridge * weight for weight in weights]

    products, covariance = sum_both(matrices, weights)
    rest = products.clone() if differ else None
    for matrix, own in zip(matrices, ridges, strict=True):
        products.add_(matrix, alpha=own)
    shared = covariance.mean(dim=0)  # a, (n,)
    if differ:
        shared /= float(before.mean()) + 1e-12
    covariance.diagonal().add_(sum(ridges))
    if rest is not None:  # v_k C_k = c_k C_k + 1 v̄_k C_k
        rest.addmm_(matrices.sum(dim=0), covariance, alpha=-1 / models)
        rest += _mean_products(means, matrices, weights).addmm_(means.sum(dim=0), covariance, alpha=-1 / models)
    # Sherman and Morrison: (S + 1aᵀ)⁻¹ = S⁻¹ − S⁻¹1 aᵀS⁻¹/(1 + aᵀS⁻¹1), of the two rows aᵀS⁻¹ and B S⁻¹.
    solved = divide(torch.cat([products, shared[None]]), covariance, workspace=matrices)
    merged, shared = solved[:-1], solved[-1]
    merged = torch.addr(merged, merged.sum(dim=1), shared, alpha=-1 / (1 + float(shared.sum())))
    if rest is not None:
        merged += _flat_components(rest.add_(merged), int(0.3 * min(matrices.shape[1:])))
    return merged


def _mean_products(means: Tensor, centered: Tensor, weights: list[float]) -> Tensor:
    """Σ_k w_k v̄_k c_kᵀc_k, (1, n), of v̄ (K, 1, n) and c (K, m, n)."""
    parts = zip(means, centered, weights, strict=True)
    return torch.stack([(mean @ matrix.T) @ matrix * weight for mean, matrix, weight in parts]).sum(dim=0)


def _flat_components(matrix: Tensor, rank: int) -> Tensor:
    """mean(σ)·U Vᵀ of the largest components."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    side, values, rows = leading_components(wide, rank, rounding(*wide.shape))
    if not len(values):
        return torch.zeros_like(matrix)
    flat = (side * values.mean()) @ rows
    return flat if wide is matrix else flat.T


def _center_(matrices: Tensor) -> Tensor:
    """Take the mean row from each of (K, m, n), in place; returns the means, (K, 1, n)."""
    means = matrices.mean(dim=1, keepdim=True)
    matrices -= means
    return means


def _squared_norms(matrices: Tensor) -> list[float]:
    return [float(torch.linalg.vector_norm(matrix, dtype=torch.float64).square()) for matrix in matrices]
