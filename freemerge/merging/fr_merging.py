"""FR-Merging: merge what is left of the task vectors above a cutoff frequency (FREE-Merging, arXiv 2411.16815)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from freemerge.merging.filters import Filter, NyquistDisc
from freemerge.merging.method import MergeMethod, require, require_number, weighted_sum
from freemerge.merging.vectors import Vectors

_NAMED = ("align", "mean", "uniform")


@dataclass(frozen=True)
class FRMerging(MergeMethod):
    """τ = Σ_k scale_k · λ_k · G(v_k), where G removes low frequencies, in which the tasks interfere.

    The filter is linear. Whenever the coefficients do not depend on filtered vectors, τ = G(Σ_k scale_k·λ_k·v_k): one
    transform per weight, not one per task. One pass; two with "mean".

    Args:
        filter: G.
        coefficients: λ. "align", the released code: for each tensor, bring every filtered vector to the mean magnitude
            of the largest, λ_k = max_j E|G(v_j)| / E|G(v_k)|. "mean", the paper: λ_k = E|v_k| / Σ_j E|v_j| over the
            whole model. "uniform": λ_k = 1. Or one number per model.
        scale: multiplies the result, or each model's part of it: one number for all models or one per model.
    """

    survey_fields: ClassVar = ("coefficients",)

    filter: Filter = field(default_factory=NyquistDisc)
    coefficients: Literal["align", "mean", "uniform"] | list[float] = "align"
    scale: float | list[float] = 1.0

    def __post_init__(self) -> None:
        require(isinstance(self.filter, Filter), self, f"`filter` must be a Filter, got {self.filter!r}")
        if isinstance(self.coefficients, str):
            require(
                self.coefficients in _NAMED,
                self,
                f'`coefficients` must be "align", "mean", "uniform" or a list of numbers, got {self.coefficients!r}',
            )
        else:
            require_number(self, "coefficients", self.coefficients)
        require_number(self, "scale", self.scale)

    def survey(self, vectors: Vectors) -> Tensor | None:
        """The paper's λ over the whole model, (K,) float64; None for the other coefficients."""
        if self.coefficients != "mean":
            return None
        totals = torch.zeros(len(vectors.labels), dtype=torch.float64)
        for deltas in vectors.pieces():
            totals += deltas.abs_().sum(1, dtype=torch.float64).cpu()  # float64: no drift over billions of entries
        return totals / totals.sum().clamp(min=torch.finfo(torch.float64).tiny)

    def combine(self, name: str, deltas: Tensor, statistics: Tensor | None) -> Tensor:
        scale = torch.as_tensor(self.scale, dtype=torch.float64)
        if self.coefficients == "align":
            before = _magnitudes(deltas)
            for delta in deltas:
                delta.copy_(self.filter(delta))
            return weighted_sum(deltas, alignment(_magnitudes(deltas), before) * scale)
        if statistics is not None:
            weights = statistics * scale
        elif self.coefficients == "uniform":
            weights = scale.expand(len(deltas))
        else:
            weights = torch.tensor(self.coefficients, dtype=torch.float64) * scale
        return self.filter(weighted_sum(deltas, weights))


def alignment(after: Tensor, before: Tensor) -> Tensor:
    """λ_k = max_j E|G(v_j)| / E|G(v_k)|, for one tensor.

    A vector of which the filter leaves nothing but rounding gets 0: there is nothing to bring up.

    Args:
        after: E|G(v_k)|, (K,) float64.
        before: E|v_k|, (K,) float64.

    Returns:
        (K,) float64.
    """
    something = after > before * torch.finfo(torch.float32).eps
    after = torch.where(something, after, 0.0)
    return torch.where(something, after.max() / after, 0.0)


def _magnitudes(deltas: Tensor) -> Tensor:
    """E|v_k|: (K, *shape) float32 → (K,) float64 on the CPU."""
    return torch.stack([delta.abs().mean(dtype=torch.float64) for delta in deltas]).cpu()
