"""Weight averaging: the mean of the fine-tuned models (Wortsman et al., ICML 2022, arXiv 2203.05482)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from freemerge.merging.methods.base import MergeMethod, weighted_sum


@dataclass(frozen=True)
class WeightAverage(MergeMethod):
    """τ = (1/K) · Σ_k v_k. One pass."""

    statistics_fields: ClassVar = ()

    @property
    def elementwise(self) -> bool:
        return True

    def combine(self, name: str, deltas: Tensor, statistics: Any) -> Tensor:
        return weighted_sum(deltas, 1.0 / len(deltas))
