"""Base class of methods that merge the largest entries of each task."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from freemerge.merging.methods.base import MergeMethod, each_of, require, require_number, require_scope
from freemerge.merging.methods.magnitudes import own_magnitudes
from freemerge.merging.task_vectors import Vectors
from freemerge.tensors.differences import flat


@dataclass(frozen=True)
class TrimmingMethod(MergeMethod):
    """Trim each task vector to its largest entries, then merge the trimmed vectors.

    v_k keeps its entries with |v| ≥ t_k, its ⌊density·D⌋-th largest magnitude (ties with t_k are kept too).

    Two passes, the first to find t_k exactly within a bracket from a sample; one pass if nothing is trimmed. More if
    the sampled bounds miss t_k.

    Args:
        density: fraction of the entries to keep, in (0, 1], one for all models or one per model.
        scale: multiplies the result.
        scope: where the density applies: to the whole "model", or to each "tensor" separately.
    """

    statistics_fields: ClassVar = ("density", "scope")

    density: float | list[float] = 1.0
    scale: float = 1.0
    scope: Literal["model", "tensor"] = "model"

    def __post_init__(self) -> None:
        require_number(self, "density", self.density)
        inside = all(0 < density <= 1 for density in each_of(self.density, 1))
        require(inside, self, f"`density` must lie in (0, 1], got {self.density}")
        require_number(self, "scale", self.scale)
        require_scope(self, self.scope)

    @abstractmethod
    def merge_trimmed_(self, values: Tensor) -> Tensor:
        """Merge the trimmed vectors without the scale: (K, n) float32, which may be overwritten → (n,)."""

    @property
    def elementwise(self) -> bool:
        return True

    @property
    def passes(self) -> int:
        return 2 if min(each_of(self.density, 1)) < 1 else 1

    def collect_statistics(self, vectors: Vectors) -> Tensor | dict[str, Tensor] | None:
        """Find t_k, (K, 1) float32, over the whole model or, by name, for each tensor; None if nothing is trimmed."""
        if min(each_of(self.density, 1)) == 1 or vectors.numel == 0:
            return None
        return own_magnitudes(vectors, self.scope, each_of(self.density, len(vectors.labels)), _ranks)

    def combine(self, name: str, deltas: Tensor, statistics: Tensor | dict[str, Tensor] | None) -> Tensor:
        values = flat(deltas)
        if values.shape[1] == 0:
            return deltas[0].clone()
        if statistics is not None:
            trim_(values, (statistics[name] if isinstance(statistics, dict) else statistics)[:, 0])
        return self.merge_trimmed_(values).mul_(self.scale).reshape(deltas.shape[1:])


def _ranks(total: int, density: float) -> list[int]:
    """Zero-based ascending rank of the smallest magnitude that is kept."""
    return [total - max(1, int(total * density))]


def trim_(values: Tensor, thresholds: Tensor) -> None:
    """Set the entries of (K, n) whose magnitudes lie below their row's threshold, (K,), to zero."""
    # hardshrink zeroes values up to and including its bound, so the bound is the next smaller number.
    bounds = torch.nextafter(thresholds, torch.full_like(thresholds, -torch.inf)).tolist()
    for row, bound in zip(values, bounds, strict=True):
        torch.hardshrink(row, bound, out=row)
