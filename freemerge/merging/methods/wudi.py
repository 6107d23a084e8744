"""WUDI-Merging: interference minimized along the task vectors' own rows (Cheng et al., ICML 2025, arXiv 2503.08099)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from freemerge.merging.methods.base import require, require_number, weighted_sum
from freemerge.merging.methods.matrices import MatrixMethod, is_embedding
from freemerge.tensors.covariances import pseudo_inverse, sum_both

_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # Adam's defaults, which the released code uses


@dataclass(frozen=True)
class WUDIMerging(MatrixMethod):
    """Minimize the interference of the merged matrix with each task, along the rows of its task vector. One pass.

    L(τ) = Σ_k ‖(τ − v_k) v_kᵀ‖²/‖v_k‖² for each matrix of a linear layer, (outputs, inputs). It is quadratic: with
    S = Σ_k v_kᵀv_k/‖v_k‖² and B = Σ_k v_k v_kᵀv_k/‖v_k‖² its gradient is 2(τ S − B).

    - solver "adam", the released code: `steps` of Adam from Σ_k v_k. It stops before convergence, at a point that
      depends on the ratio of the learning rate to the size of the task vectors.
    - solver "exact": the minimum τ = B S⁺ itself, which depends on neither.

    Embeddings and tensors that are not matrices are averaged. The released code for CLIP keeps the base's; `exclude`
    them for that.

    Args:
        scale: multiplies the result.
        filter: see `MatrixMethod`.
        align: see `MatrixMethod`.
        solver: "adam" or "exact".
        steps: number of Adam steps.
        learning_rate: learning rate of Adam.
    """

    linear_in_scale: ClassVar = True

    solver: Literal["adam", "exact"] = "adam"
    steps: int = 300
    learning_rate: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.solver in ("adam", "exact"), self, f'`solver` must be "adam" or "exact", got {self.solver!r}')
        whole = isinstance(self.steps, int) and not isinstance(self.steps, bool) and self.steps > 0
        require(whole, self, f"`steps` must be a positive integer, got {self.steps!r}")
        require_number(self, "learning_rate", self.learning_rate)
        require(self.learning_rate > 0, self, f"`learning_rate` must be positive, got {self.learning_rate}")

    def is_merged(self, name: str) -> bool:
        return not is_embedding(name)

    def combine_matrix(self, name: str, matrices: Tensor) -> Tensor:
        norms = [float(torch.linalg.vector_norm(matrix, dtype=torch.float64).square()) for matrix in matrices]
        weights = [1 / norm if norm > 0 else 0.0 for norm in norms]
        products, covariance = sum_both(matrices, weights)
        if self.solver == "exact":
            return products @ pseudo_inverse(covariance).to(products.dtype)
        return self._descend(weighted_sum(matrices, 1.0), products, covariance)

    def _descend(self, merged: Tensor, products: Tensor, covariance: Tensor) -> Tensor:
        """Run Adam from `merged`, which is overwritten."""
        first, second = torch.zeros_like(merged), torch.zeros_like(merged)
        gradient = torch.empty_like(merged)
        fast, slow = _BETAS
        for step in range(1, self.steps + 1):
            torch.addmm(products, merged, covariance, beta=-2, alpha=2, out=gradient)
            first.lerp_(gradient, 1 - fast)
            second.mul_(slow).addcmul_(gradient, gradient, value=1 - slow)
            torch.sqrt(second, out=gradient)
            gradient.div_((1 - slow**step) ** 0.5).add_(_EPSILON)
            merged.addcdiv_(first, gradient, value=-self.learning_rate / (1 - fast**step))
        return merged
