"""TIES-Merging: trim, elect a sign, average those who agree (Yadav et al., NeurIPS 2023, arXiv 2306.01708)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from freemerge.merging.method import MergeMethod, flat, require, require_number
from freemerge.merging.ranks import order_statistics
from freemerge.merging.vectors import Vectors


@dataclass(frozen=True)
class Ties(MergeMethod):
    """Keep each model's largest entries, elect a sign per entry, average the entries of that sign.

    1. Trim: v_k keeps its entries with |v| ≥ t_k, its ⌊density·D⌋-th largest magnitude (equals of t_k are kept too).
    2. Elect: γ = sign(Σ_k v_k).
    3. Disjoint mean: τ = scale · mean of {v_k : sign(v_k) = γ}; zero where no entry is left.

    Three passes with scope "model" (two to find t_k exactly), one with "tensor".

    Args:
        density: fraction of the entries to keep, in (0, 1].
        scale: λ, multiplies the result.
        scope: over what the density counts: the whole "model", as in the paper, or each "tensor" by itself.
    """

    density: float = 0.2
    scale: float = 1.0
    scope: Literal["model", "tensor"] = "model"

    def __post_init__(self) -> None:
        require_number(self, "density", self.density)
        require(0 < self.density <= 1, self, f"`density` must lie in (0, 1], got {self.density}")
        require_number(self, "scale", self.scale)
        require(self.scope in ("model", "tensor"), self, f'`scope` must be "model" or "tensor", got {self.scope!r}')

    def survey(self, vectors: Vectors) -> Tensor | None:
        """Find t_k over the whole model, (K,) float32; None with scope "tensor" or if nothing is trimmed."""
        if self.scope == "tensor" or self.density == 1 or vectors.numel == 0:
            return None
        rank = vectors.numel - max(1, int(vectors.numel * self.density))
        return order_statistics(lambda: (flat(deltas).abs() for _, deltas in vectors), [rank])[:, 0]

    def combine(self, name: str, deltas: Tensor, statistics: Tensor | None) -> Tensor:
        values = flat(deltas)
        if values.shape[1] == 0:
            return deltas[0].clone()
        if self.density < 1:
            if statistics is None:
                rank = values.shape[1] - max(1, int(values.shape[1] * self.density))
                thresholds = values.abs().kthvalue(rank + 1, dim=1, keepdim=True).values
            else:
                thresholds = statistics.to(values.device)[:, None]
            values = torch.where(values.abs() >= thresholds, values, 0.0)
        elected = values.sum(0).sign()
        agrees = (values.sign() == elected) & (values != 0)
        count = agrees.sum(0).clamp(min=1)
        return (torch.where(agrees, values, 0.0).sum(0) * (self.scale / count)).reshape(deltas.shape[1:])
