"""Localize-and-Stitch: each task's few largest entries, averaged where they overlap (He et al., arXiv 2408.13656)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from freemerge.merging.methods.base import require
from freemerge.merging.methods.trimming import TrimmingMethod


@dataclass(frozen=True)
class LocalizeAndStitch(TrimmingMethod):
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

    linear_in_scale: ClassVar = True

    density: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not isinstance(self.scale, (list, tuple)), self, "`scale` must be one number for all models")

    def merge_trimmed_(self, values: Tensor) -> Tensor:
        return values.sum(0).div_(values.count_nonzero(0).clamp_(min=1))
