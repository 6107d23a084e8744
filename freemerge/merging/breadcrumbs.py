"""Model Breadcrumbs: leave out each layer's smallest and largest changes (Davari & Belilovsky, arXiv 2312.06795)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from freemerge.merging.method import MergeMethod, require, require_number, weighted_sum
from freemerge.merging.ranks import tensor_order_statistics
from freemerge.merging.vectors import flat


@dataclass(frozen=True)
class Breadcrumbs(MergeMethod):
    """τ = Σ_k λ_k · m_k ⊙ v_k, where m_k removes both tails of the magnitudes of each tensor. One pass.

    Of the n entries of a tensor the ⌊bottom·n⌋ smallest and the ⌊top·n⌋ largest magnitudes are set to zero (equals of
    the last one kept stay). The defaults are the paper's β = 85 %, γ = 99.3 %, α = 0.3.

    Args:
        bottom: fraction of the smallest entries to remove, in [0, 1).
        top: fraction of the largest entries to remove, in [0, 1 − bottom).
        scale: λ, one number for all models or one per model.
    """

    survey_fields: ClassVar = ()

    bottom: float = 0.85
    top: float = 0.007
    scale: float | list[float] = 0.3

    def __post_init__(self) -> None:
        for name in ("bottom", "top", "scale"):
            require_number(self, name, getattr(self, name))
        require(0 <= self.bottom < 1, self, f"`bottom` must lie in [0, 1), got {self.bottom}")
        require(
            0 <= self.top < 1 - self.bottom, self, f"`top` must lie in [0, {1 - self.bottom:g}), as `bottom` is "
            f"{self.bottom}; got {self.top}"
        )  # fmt: skip

    def combine(self, name: str, deltas: Tensor, statistics: Any) -> Tensor:
        values = flat(deltas)
        total = values.shape[1]
        if total:
            magnitudes = values.abs()
            first = int(total * self.bottom)
            ranks = [first, max(total - 1 - int(total * self.top), first)]
            bounds = tensor_order_statistics(magnitudes, ranks)
            values.masked_fill_((magnitudes < bounds[:, :1]) | (magnitudes > bounds[:, 1:]), 0.0)
        return weighted_sum(values, self.scale).reshape(deltas.shape[1:])
