"""Model Stock: interpolate towards the mean by the angles between models (Jang et al., arXiv 2403.19522)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from freemerge.errors import MergeError
from freemerge.merging.methods.angles import AngleMethod, normalized


@dataclass(frozen=True)
class ModelStock(AngleMethod):
    """τ = scale · t · (1/K) · Σ_k v_k for each tensor, t = K·cos θ/(1 + (K − 1)·cos θ). One pass.

    θ is the angle between task vectors, cos θ the mean over all pairs, as in mergekit; a negative mean counts as 0,
    which gives the base. It suits at least two training runs of the same task.

    Args:
        scale: multiplies the result.
    """

    linear_in_scale: ClassVar = True

    def check(self, labels: Sequence[str]) -> None:
        super().check(labels)
        if len(labels) < 2:
            raise MergeError("ModelStock needs at least two fine-tuned models, to have an angle between them")

    def weigh(self, products: Tensor) -> Tensor:
        _, cosines = normalized(products)
        models = len(cosines)
        cosine = float((cosines.sum() - cosines.trace()) / (models * (models - 1)))
        cosine = min(max(cosine, 0.0), 1.0)
        ratio = models * cosine / (1 + (models - 1) * cosine)
        return cosines.new_full((models,), ratio / models)
