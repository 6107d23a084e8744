"""Weight averaging: the mean of the fine-tuned models (Wortsman et al., ICML 2022, arXiv 2203.05482)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from freemerge.merging.methods.base import MergeMethod, require, require_number, weighted_sum


@dataclass(frozen=True)
class WeightAverage(MergeMethod):
    """τ = Σ_k w_k · v_k / Σ_k w_k, by default the mean (1/K) · Σ_k v_k. One pass.

    Args:
        coefficients: w, one number per model, divided by their sum; None for equal ones.
    """

    statistics_fields: ClassVar = ()

    coefficients: list[float] | None = None

    def __post_init__(self) -> None:
        if self.coefficients is None:
            return
        require(isinstance(self.coefficients, (list, tuple)), self, "`coefficients` must be a list of numbers")
        require_number(self, "coefficients", self.coefficients)
        require(sum(self.coefficients) != 0, self, f"the sum of `coefficients` is 0: {self.coefficients}")

    @property
    def elementwise(self) -> bool:
        return True

    def combine(self, name: str, deltas: Tensor, statistics: Any) -> Tensor:
        if self.coefficients is None:
            return weighted_sum(deltas, 1.0 / len(deltas))
        total = sum(self.coefficients)
        return weighted_sum(deltas, [coefficient / total for coefficient in self.coefficients])
