"""Iso-C: isotropic merging in the common subspace (Marczak et al., ICML 2025, arXiv 2502.04959)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from freemerge.merging.methods.base import MergeMethod, require_number, weighted_sum
from freemerge.merging.task_vectors import Vectors
from freemerge.tensors.spectra import to_nearest_isometry_


@dataclass(frozen=True)
class IsoC(MergeMethod):
    """Flatten the spectrum of the summed task vectors, so that no task's directions rule. One pass.

    For a matrix, with Σ_k v_k = U diag(σ) Vᵀ: τ = scale · mean(σ) · U Vᵀ. Directions in which the sum has nothing but
    rounding (σ ≤ ε·max(m, n)·σ_max) have no U and V to speak of and are left out, of the mean too. Tensors that are not
    matrices are averaged, as in the released code.

    Args:
        scale: multiplies the result.
    """

    statistics_fields: ClassVar = ()
    linear_in_scale: ClassVar = True
    elementwise: ClassVar = True  # the sum is; `finish` is not

    scale: float = 1.0

    def __post_init__(self) -> None:
        require_number(self, "scale", self.scale)

    @property
    def finishes(self) -> bool:
        return True

    def collect_statistics(self, vectors: Vectors) -> frozenset[str]:
        """Names of the matrices."""
        return frozenset(name for name, shape in vectors.shapes.items() if len(shape) == 2)

    def combine(self, name: str, deltas: Tensor, statistics: frozenset[str]) -> Tensor:
        return self.finish(name, self.combine_chunk(name, 0, deltas, statistics))

    def combine_chunk(self, name: str, start: int, deltas: Tensor, statistics: frozenset[str]) -> Tensor:
        return weighted_sum(deltas, 1.0 if name in statistics else self.scale / len(deltas))

    def finish(self, name: str, merged: Tensor) -> Tensor:
        if merged.dim() != 2 or merged.numel() == 0:
            return merged
        values = to_nearest_isometry_(merged, max(merged.shape) * torch.finfo(merged.dtype).eps)
        return merged.mul_(values.mean() * self.scale) if len(values) else merged
