"""Localize-and-Stitch: each task's few largest entries, averaged where they overlap (He et al., arXiv 2408.13656)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from freemerge.merging.methods.base import MergeMethod, require, require_number, require_scope
from freemerge.merging.methods.magnitudes import model_magnitudes, tensor_magnitudes
from freemerge.merging.methods.ties import trim_
from freemerge.merging.task_vectors import Vectors
from freemerge.tensors.differences import flat


@dataclass(frozen=True)
class LocalizeAndStitch(MergeMethod):
    """Keep the entries in which each task is localized, and stitch them together without a scale to search.

    1. Localize, the paper's version without data: γ_k marks the ⌊density·D⌋ entries of the largest |v_k|. (Its version
       with data learns γ_k, which is not implemented.)
    2. Stitch: τ = scale · Σ_k γ_k ⊙ v_k / max(Σ_k γ_k, 1).

    Two passes, as `Ties`; one if everything is kept.

    Args:
        density: fraction of the entries to keep, in (0, 1]; the paper's 0.05 without data.
        scale: multiplies the result; 1 in the paper.
        scope: where the density applies: to the whole "model", as in the paper, or to each "tensor" separately.
    """

    statistics_fields: ClassVar = ("density", "scope")
    linear_in_scale: ClassVar = True

    density: float = 0.05
    scale: float = 1.0
    scope: Literal["model", "tensor"] = "model"

    def __post_init__(self) -> None:
        require_number(self, "density", self.density)
        require(0 < self.density <= 1, self, f"`density` must lie in (0, 1], got {self.density}")
        require_number(self, "scale", self.scale)
        require(not isinstance(self.scale, (list, tuple)), self, "`scale` must be one number for all models")
        require_scope(self, self.scope)

    @property
    def elementwise(self) -> bool:
        return True

    @property
    def passes(self) -> int:
        return 2 if self.density < 1 else 1

    def collect_statistics(self, vectors: Vectors) -> Tensor | dict[str, Tensor] | None:
        """The smallest magnitude that each task keeps, as `Ties` finds it; None if nothing is left out."""
        if self.density == 1 or vectors.numel == 0:
            return None
        if self.scope == "tensor":
            return tensor_magnitudes(vectors, lambda size: [self._rank(size)])
        return model_magnitudes(vectors, [self._rank(vectors.numel)])

    def combine(self, name: str, deltas: Tensor, statistics: Tensor | dict[str, Tensor] | None) -> Tensor:
        values = flat(deltas)
        if values.shape[1] == 0:
            return deltas[0].clone()
        if statistics is not None:
            trim_(values, (statistics[name] if isinstance(statistics, dict) else statistics)[:, 0])
        total = values.sum(0)
        kept = values.count_nonzero(0).clamp_(min=1)
        return total.div_(kept).mul_(self.scale).reshape(deltas.shape[1:])

    def _rank(self, total: int) -> int:
        """Zero-based ascending rank of the smallest magnitude that is kept."""
        return total - max(1, int(total * self.density))
