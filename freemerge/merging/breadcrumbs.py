"""Model Breadcrumbs: leave out each layer's smallest and largest changes (Davari & Belilovsky, arXiv 2312.06795)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from freemerge.merging.method import MergeMethod, require, require_number, require_scope, weighted_sum
from freemerge.merging.ranks import magnitudes, model_magnitudes, tensor_order_statistics
from freemerge.merging.threads import each
from freemerge.merging.vectors import Vectors, flat


@dataclass(frozen=True)
class Breadcrumbs(MergeMethod):
    """τ = Σ_k λ_k · m_k ⊙ v_k, where m_k removes both tails of the magnitudes.

    Of n entries the ⌊bottom·n⌋ smallest and the ⌊top·n⌋ largest magnitudes are set to zero (equals of the last one
    kept stay). The defaults are the paper's β = 85 %, γ = 99.3 %, α = 0.3. One pass with scope "tensor", two with
    "model".

    Args:
        bottom: fraction of the smallest entries to remove, in [0, 1).
        top: fraction of the largest entries to remove, in [0, 1 − bottom).
        scale: λ, one number for all models or one per model.
        scope: over what the fractions count: each "tensor" by itself, as in the paper, or the whole "model".
    """

    survey_fields: ClassVar = ("bottom", "top", "scope")

    bottom: float = 0.85
    top: float = 0.007
    scale: float | list[float] = 0.3
    scope: Literal["model", "tensor"] = "tensor"

    def __post_init__(self) -> None:
        for name in ("bottom", "top", "scale"):
            require_number(self, name, getattr(self, name))
        require(0 <= self.bottom < 1, self, f"`bottom` must lie in [0, 1), got {self.bottom}")
        require(
            0 <= self.top < 1 - self.bottom, self, f"`top` must lie in [0, {1 - self.bottom:g}), as `bottom` is "
            f"{self.bottom}; got {self.top}"
        )  # fmt: skip
        require_scope(self, self.scope)

    @property
    def elementwise(self) -> bool:
        return self.scope == "model"

    @property
    def passes(self) -> int:
        return 2 if self.scope == "model" else 1

    def survey(self, vectors: Vectors) -> Tensor | None:
        """The least and the greatest magnitude that each model keeps, (K, 2) float32; None with scope "tensor"."""
        if self.scope == "tensor" or vectors.numel == 0:
            return None
        return model_magnitudes(vectors, self._ranks(vectors.numel))

    def combine(self, name: str, deltas: Tensor, statistics: Tensor | None) -> Tensor:
        values = flat(deltas)
        if values.shape[1] == 0:
            return deltas[0].clone()
        if statistics is None:
            each(self._trim, list(values))
        else:  # a piece is too short to be shared between threads
            for row, bounds in zip(values, statistics, strict=True):
                self._trim(row, bounds)
        return weighted_sum(values, self.scale).reshape(deltas.shape[1:])

    def _ranks(self, total: int) -> list[int]:
        """Zero-based ascending ranks of the least and the greatest of the magnitudes that are kept."""
        first = int(total * self.bottom)
        return [first, max(total - 1 - int(total * self.top), first)]

    def _trim(self, row: Tensor, bounds: Tensor | None = None) -> None:
        """Remove the tails of one model's entries, (n,), in place; the bounds, (2,), are its own if not given."""
        sizes = magnitudes(row)
        if bounds is None:
            bounds = tensor_order_statistics(sizes[None], self._ranks(len(row)))[0]
        low, high = bounds.tolist()
        row.masked_fill_((sizes < low) | (sizes > high), 0.0)
