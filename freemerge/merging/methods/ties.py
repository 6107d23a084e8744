"""TIES-Merging: trim, elect a sign, average the entries that agree (Yadav et al., NeurIPS 2023, arXiv 2306.01708)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from freemerge.merging.methods.base import MergeMethod, require, require_number, require_scope
from freemerge.merging.methods.magnitudes import model_magnitudes, tensor_magnitudes
from freemerge.merging.task_vectors import Vectors
from freemerge.tensors.differences import flat


@dataclass(frozen=True)
class Ties(MergeMethod):
    """Keep each model's largest entries, elect a sign per entry, average the entries of that sign.

    1. Trim: v_k keeps its entries with |v| ≥ t_k, its ⌊density·D⌋-th largest magnitude (ties with t_k are kept too).
    2. Elect: γ = sign(Σ_k v_k).
    3. Disjoint mean: τ = scale · mean of {v_k : sign(v_k) = γ}; zero where no entry is left.

    Two passes, the first to find t_k exactly within a bracket from a sample; one pass if nothing is trimmed. More if
    the sampled bounds miss t_k.

    Args:
        density: fraction of the entries to keep, in (0, 1].
        scale: λ, multiplies the result.
        scope: where the density applies: to the whole "model", as in the paper, or to each "tensor" separately.
    """

    statistics_fields: ClassVar = ("density", "scope")
    linear_in_scale: ClassVar = True

    density: float = 0.2
    scale: float = 1.0
    scope: Literal["model", "tensor"] = "model"

    def __post_init__(self) -> None:
        require_number(self, "density", self.density)
        require(0 < self.density <= 1, self, f"`density` must lie in (0, 1], got {self.density}")
        require_number(self, "scale", self.scale)
        require_scope(self, self.scope)

    @property
    def elementwise(self) -> bool:
        return True

    @property
    def passes(self) -> int:
        return 2 if self.density < 1 else 1

    def collect_statistics(self, vectors: Vectors) -> Tensor | dict[str, Tensor] | None:
        """Find t_k, (K, 1) float32, over the whole model or, by name, for each tensor; None if nothing is trimmed."""
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
        return elected_mean_(values).mul_(self.scale).reshape(deltas.shape[1:])

    def _rank(self, total: int) -> int:
        """Zero-based ascending rank of the smallest magnitude that is kept."""
        return total - max(1, int(total * self.density))


def elected_mean_(values: Tensor) -> Tensor:
    """Elect a sign per entry by the sum, and average the entries of that sign: (K, n), overwritten → (n,)."""
    sign = values.sum(0).sign_()
    # Entries of the elected sign, as magnitudes. Where the sum is zero there are none, and their mean is zero too.
    agreeing = values.mul_(sign).clamp_(min=0)
    total = agreeing.sum(0)
    return total.mul_(sign).div_(agreeing.sign_().sum(0).clamp_(min=1))


def trim_(values: Tensor, thresholds: Tensor) -> None:
    """Set the entries of (K, n) whose magnitudes lie below their row's threshold, (K,), to zero."""
    # hardshrink zeroes values up to and including its bound, so the bound is the next smaller number.
    bounds = torch.nextafter(thresholds, torch.full_like(thresholds, -torch.inf)).tolist()
    for row, bound in zip(values, bounds, strict=True):
        torch.hardshrink(row, bound, out=row)
