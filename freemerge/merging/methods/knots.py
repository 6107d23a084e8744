"""KnOTS: merge low-rank updates in a common basis (Stoica et al., ICLR 2025, arXiv 2410.19735)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from freemerge.merging.methods.base import MergeMethod
from freemerge.merging.methods.subspaces import Merge, merge_in_subspaces
from freemerge.merging.methods.ties import Ties
from freemerge.merging.methods.wrapper import MethodWrapper
from freemerge.merging.task_vectors import Vectors
from freemerge.tensors.spectra import left_basis, rounding


@dataclass(frozen=True)
class KnOTS(MethodWrapper):
    """Let another method merge the tasks' components along common directions, instead of entries of the matrices.

    For each matrix, [v_1 … v_K] = U Σ [V_1 … V_K] by one singular value decomposition of the task vectors side by side,
    without directions that are only rounding. The inner method merges V_1 … V_K, each (R, n), to V; τ = scale · U Σ V.
    Made for LoRA, where R ≤ Σ_k rank_k is small; for full-rank models R is m.

    The inner method sees one matrix's components at a time: statistics over a model are taken over these. It merges
    tensors that are not matrices directly. One pass.

    Args:
        method: merges the components; by default TIES, as in the paper.
        scale: multiplies the result.
    """

    statistics_fields: ClassVar = ()
    linear_in_scale: ClassVar = True

    method: MergeMethod = field(default_factory=Ties)

    @property
    def passes(self) -> int:
        return 1

    def collect_statistics(self, vectors: Vectors) -> None:
        """No statistics of the whole model are needed."""

    def combine(self, name: str, deltas: Tensor, statistics: Any) -> Tensor:
        return merge_in_subspaces(self.method, name, deltas, self._merge).mul_(self.scale)

    def _merge(self, matrices: Tensor, merge: Merge) -> Tensor:
        joined = matrices.transpose(0, 1).flatten(1)  # (m, K·n)
        directions, values = left_basis(joined, rounding(*joined.shape))
        components = torch.stack([(directions / values).T @ matrix for matrix in matrices])  # (K, R, n)
        return (directions * values) @ merge(components)
