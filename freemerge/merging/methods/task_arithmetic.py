"""Task arithmetic: the sum of the task vectors, scaled (Ilharco et al., ICLR 2023, arXiv 2212.04089)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from freemerge.merging.methods.base import MergeMethod, require_number, weighted_sum


@dataclass(frozen=True)
class TaskArithmetic(MergeMethod):
    """τ = Σ_k λ_k · v_k. One pass.

    Args:
        scale: λ, one number for all models or one per model.
    """

    statistics_fields: ClassVar = ()
    linear_in_scale: ClassVar = True

    scale: float | list[float] = 0.3

    def __post_init__(self) -> None:
        require_number(self, "scale", self.scale)

    @property
    def elementwise(self) -> bool:
        return True

    def combine(self, name: str, deltas: Tensor, statistics: Any) -> Tensor:
        return weighted_sum(deltas, self.scale)
