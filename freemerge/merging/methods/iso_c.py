"""Iso-C: isotropic merging in the common subspace (Marczak et al., ICML 2025, arXiv 2502.04959)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from freemerge.merging.methods.base import weighted_sum
from freemerge.merging.methods.matrices import MatrixMethod, stack_shape
from freemerge.merging.task_vectors import Vectors
from freemerge.tensors.spectra import to_nearest_isometry_


@dataclass(frozen=True)
class IsoC(MatrixMethod):
    """Flatten the spectrum of the summed task vectors, so that no task's directions dominate. One pass.

    For a matrix, with Σ_k v_k = U diag(σ) Vᵀ: τ = scale · mean(σ) · U Vᵀ. Directions in which the sum is only rounding
    (σ ≤ ε·max(m, n)·σ_max) have no meaningful U and V and are left out, also of the mean. Tensors that are not matrices
    are averaged; the released code averages convolutions and stacked experts too.

    Args:
        scale: multiplies the result.
        filter: see `MatrixMethod`.
        align: see `MatrixMethod`.
    """

    linear_in_scale: ClassVar = True

    @property
    def elementwise(self) -> bool:
        return not self.align  # the sum is elementwise; `finish` is not

    @property
    def finishes(self) -> bool:
        return self.elementwise

    def collect_statistics(self, vectors: Vectors) -> frozenset[str]:
        """Names of the tensors that are treated as a matrix or a stack of matrices."""
        return frozenset(name for name, shape in vectors.shapes.items() if stack_shape(name, shape) is not None)

    def combine(self, name: str, deltas: Tensor, statistics: frozenset[str]) -> Tensor:
        if self.align:
            return super().combine(name, deltas, statistics)
        return self.finish(name, self.combine_chunk(name, 0, deltas, statistics))

    def combine_chunk(self, name: str, start: int, deltas: Tensor, statistics: frozenset[str]) -> Tensor:
        return weighted_sum(deltas, 1.0 if name in statistics else self.scale / len(deltas))

    def finish(self, name: str, merged: Tensor) -> Tensor:
        shape = stack_shape(name, merged.shape)
        if shape is None or merged.numel() == 0:
            return merged
        for matrix in merged.view(shape):
            if self.filter is not None:  # the filter is linear: filtering the sum equals summing the filtered vectors
                self.filter.apply_(matrix)
            flatten_spectrum_(matrix).mul_(self.scale)
        return merged

    def combine_matrix(self, name: str, matrices: Tensor) -> Tensor:
        return flatten_spectrum_(weighted_sum(matrices, 1.0))


def flatten_spectrum_(matrix: Tensor) -> Tensor:
    """Give all singular values of a matrix, (m, n) float32, their mean, in place."""
    values = to_nearest_isometry_(matrix, max(matrix.shape) * torch.finfo(matrix.dtype).eps)
    return matrix.mul_(values.mean()) if len(values) else matrix
