"""Model Breadcrumbs: leave out each layer's smallest and largest changes (Davari & Belilovsky, arXiv 2312.06795)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from freemerge.merging.methods.base import (
    MergeMethod,
    pairs_of,
    require,
    require_number,
    require_scope,
    weighted_sum,
)
from freemerge.merging.methods.magnitudes import own_magnitudes
from freemerge.merging.methods.ties import elected_mean_, elected_sum_
from freemerge.merging.task_vectors import Vectors
from freemerge.tensors.differences import flat


@dataclass(frozen=True)
class Breadcrumbs(MergeMethod):
    """τ = Σ_k λ_k · m_k ⊙ v_k, where m_k removes both tails of the magnitudes.

    Of n entries the ⌊bottom·n⌋ smallest and the ⌊top·n⌋ largest magnitudes are set to zero (ties with the last one kept
    stay). The defaults are the paper's β = 85 %, γ = 99.3 %, α = 0.3. Two passes.

    Args:
        bottom: fraction of the smallest entries to remove, in [0, 1), one for all models or one per model.
        top: fraction of the largest entries to remove, in [0, 1 − bottom), the same.
        scale: λ, one number for all models or one per model.
        scope: where the fractions apply: to each "tensor" separately, as in the paper, or to the whole "model".
        elect: true for TIES' election: of λ_k · m_k ⊙ v_k the mean of the entries whose sign is the sum's; "sum" for
            their sum, as in mergekit's `breadcrumbs_ties`.
    """

    statistics_fields: ClassVar = ("bottom", "top", "scope")
    linear_in_scale: ClassVar = True

    bottom: float | list[float] = 0.85
    top: float | list[float] = 0.007
    scale: float | list[float] = 0.3
    scope: Literal["model", "tensor"] = "tensor"
    elect: bool | Literal["sum"] = False

    def __post_init__(self) -> None:
        for name in ("bottom", "top", "scale"):
            require_number(self, name, getattr(self, name))
        for bottom, top in pairs_of(self.bottom, self.top):
            require(0 <= bottom < 1, self, f"`bottom` must lie in [0, 1), got {bottom}")
            inside = 0 <= top < 1 - bottom
            require(inside, self, f"`top` must lie in [0, {1 - bottom:g}), as `bottom` is {bottom}; got {top}")
        require_scope(self, self.scope)
        valid = isinstance(self.elect, bool) or self.elect == "sum"
        require(valid, self, f"`elect` must be true, false or 'sum', got {self.elect!r}")

    @property
    def elementwise(self) -> bool:
        return True

    @property
    def passes(self) -> int:
        return 2

    def collect_statistics(self, vectors: Vectors) -> Tensor | dict[str, Tensor] | None:
        """The smallest and the largest magnitude that each model keeps, (K, 2) float32; by name with scope "tensor"."""
        if vectors.numel == 0:
            return None
        pairs = pairs_of(self.bottom, self.top, len(vectors.labels))
        return own_magnitudes(vectors, self.scope, pairs, _ranks)

    def combine(self, name: str, deltas: Tensor, statistics: Tensor | dict[str, Tensor] | None) -> Tensor:
        values = flat(deltas)
        if values.shape[1] == 0:
            return deltas[0].clone()
        bounds = statistics[name] if isinstance(statistics, dict) else statistics
        assert bounds is not None  # only a model without values has none
        for row, (low, high) in zip(values, bounds.tolist(), strict=True):
            sizes = row.abs()
            row.masked_fill_((sizes < low) | (sizes > high), 0.0)
        if not self.elect:
            return weighted_sum(values, self.scale).reshape(deltas.shape[1:])
        merge = elected_sum_ if self.elect == "sum" else elected_mean_
        if isinstance(self.scale, (list, tuple)):
            for row, scale in zip(values, self.scale, strict=True):
                row.mul_(scale)
            return merge(values).reshape(deltas.shape[1:])
        return merge(values).mul_(self.scale).reshape(deltas.shape[1:])


def _ranks(total: int, fractions: tuple[float, float]) -> list[int]:
    """Zero-based ascending ranks of the smallest and the largest magnitude that is kept."""
    bottom, top = fractions
    first = int(total * bottom)
    return [first, max(total - 1 - int(total * top), first)]
