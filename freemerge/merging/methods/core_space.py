"""Core Space: merge low-rank updates as small matrices between common bases (Panariello et al., arXiv 2509.17786)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from freemerge.merging.methods.base import MergeMethod
from freemerge.merging.methods.subspaces import Merge, merge_in_subspaces
from freemerge.merging.methods.tsv import TSVMerge
from freemerge.merging.methods.wrapper import MethodWrapper
from freemerge.merging.task_vectors import Vectors
from freemerge.tensors.spectra import components, left_basis, rounding


@dataclass(frozen=True)
class CoreSpace(MethodWrapper):
    """Let another method merge small core matrices, which contain all information of the task vectors.

    For each matrix, v_k = B_k A_k, from its singular value decomposition with the square roots of the singular values
    in both. With U the left singular vectors of [B_1 … B_K] and V the right ones of the stacked A_1 … A_K, without
    directions that are only rounding, M_k = Uᵀ v_k V is the core, with at most Σ_k rank_k rows and columns: no
    information is lost, v_k = U M_k Vᵀ. The method inside merges the cores to M; τ = scale · U M Vᵀ. Made for LoRA. The
    paper takes B_k and A_k from the adapters, which have the same spans.

    The inner method sees one core at a time: statistics over a model are taken over this core. It merges tensors that
    are not matrices directly. One pass.

    Args:
        method: merges the cores; `PCBMerging` there balances components instead of entries.
        scale: multiplies the result.
    """

    statistics_fields: ClassVar = ()
    linear_in_scale: ClassVar = True

    method: MergeMethod = field(default_factory=TSVMerge)

    @property
    def passes(self) -> int:
        return 1

    def collect_statistics(self, vectors: Vectors) -> None:
        """No statistics of the whole model are needed."""

    def combine(self, name: str, deltas: Tensor, statistics: Any) -> Tensor:
        return merge_in_subspaces(self.method, name, deltas, self._merge).mul_(self.scale)

    def _merge(self, matrices: Tensor, merge: Merge) -> Tensor:
        lefts, rights = [], []
        for matrix in matrices:
            left, values, right = components(matrix, rounding(*matrix.shape))
            roots = values.sqrt()
            lefts.append(left * roots)
            rights.append(right.T * roots)
        joined = (torch.cat(lefts, dim=1), torch.cat(rights, dim=1))
        left, right = (left_basis(factors, rounding(*factors.shape))[0] for factors in joined)  # (m, R), (n, R')
        cores = torch.stack([left.T @ matrix @ right for matrix in matrices])
        return left @ merge(cores) @ right.T
