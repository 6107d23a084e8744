"""Base class of methods that use only the norms of a tensor's task vectors and the angles between them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from freemerge.merging.methods.base import MergeMethod, require, require_number, weighted_sum
from freemerge.merging.task_vectors import blocks, flat


@dataclass(frozen=True)
class AngleMethod(MergeMethod):
    """τ = Σ_k c_k · v_k for each tensor, with c from the inner products of its task vectors. One pass.

    Args:
        scale: multiplies the result.
    """

    statistics_fields: ClassVar[tuple[str, ...] | None] = ()

    scale: float = 1.0

    def __post_init__(self) -> None:
        require_number(self, "scale", self.scale)
        require(not isinstance(self.scale, (list, tuple)), self, "`scale` must be one number for all models")

    def combine(self, name: str, deltas: Tensor, statistics: Any) -> Tensor:
        products = inner_products(deltas)
        return weighted_sum(deltas, self.weigh(products) * self.scale)

    @abstractmethod
    def weigh(self, products: Tensor) -> Tensor:
        """c, (K,) float64, from the inner products ⟨v_i, v_j⟩, (K, K) float64."""


def inner_products(deltas: Tensor) -> Tensor:
    """⟨v_i, v_j⟩ of (K, *shape) float32, added up in float64: (K, K) float64 on the CPU."""
    total = torch.zeros(len(deltas), len(deltas), dtype=torch.float64, device=deltas.device)
    for block in blocks(flat(deltas)):
        block = block.double()
        total.addmm_(block, block.T)
    return total.cpu()


def normalized(products: Tensor) -> tuple[Tensor, Tensor]:
    """Norms, (K,), and cosines, (K, K), from inner products; the cosines with a vector of zeros are 0."""
    norms = products.diagonal().sqrt()
    inverse = inverse_of(norms)
    return norms, (products * inverse * inverse[:, None]).clamp(-1, 1)


def inverse_of(norms: Tensor) -> Tensor:
    """1/‖v_k‖, and 0 for a vector of zeros."""
    return torch.where(norms > 0, 1 / norms, 0.0)


def shares(coefficients: list[float] | None, models: int) -> Tensor:
    """Weights that sum to one, (K,) float64; equal weights for None."""
    weights = torch.tensor([1.0] * models if coefficients is None else coefficients, dtype=torch.float64)
    return weights / weights.sum()


def require_weights(method: object, coefficients: list[float] | None) -> None:
    """Require nonnegative weights that are not all zero, or None."""
    if coefficients is None:
        return
    require(isinstance(coefficients, (list, tuple)), method, f"`coefficients` must be a list, got {coefficients!r}")
    require_number(method, "coefficients", coefficients)
    valid = min(coefficients) >= 0 and max(coefficients) > 0
    require(valid, method, f"`coefficients` must be at least 0 and not all 0, got {coefficients}")
