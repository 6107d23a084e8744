"""Iso-C: isotropic merging in the common subspace (Marczak et al., ICML 2025, arXiv 2502.04959)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from freemerge.merging.method import MergeMethod, require_number, weighted_sum


@dataclass(frozen=True)
class IsoC(MergeMethod):
    """Flatten the spectrum of the summed task vectors, so that no task's directions rule. One pass.

    For a matrix, with Σ_k v_k = U diag(σ) Vᵀ: τ = scale · mean(σ) · U Vᵀ. Directions in which the sum has nothing but
    rounding (σ ≤ ε·max(m, n)·σ_max) have no U and V to speak of and are left out, of the mean too. Tensors that are not
    matrices are averaged, as in the released code.

    Args:
        scale: multiplies the result.
    """

    survey_fields: ClassVar = ()

    scale: float = 1.0

    def __post_init__(self) -> None:
        require_number(self, "scale", self.scale)

    def combine(self, name: str, deltas: Tensor, statistics: Any) -> Tensor:
        if deltas.dim() != 3 or deltas[0].numel() == 0:
            return weighted_sum(deltas, self.scale / len(deltas))
        u, s, vh = torch.linalg.svd(weighted_sum(deltas, 1.0), full_matrices=False)
        rank = int((s > s[0] * max(deltas.shape[1:]) * torch.finfo(s.dtype).eps).sum())
        if rank == 0:
            return torch.zeros_like(deltas[0])
        return (u[:, :rank] @ vh[:rank]).mul_(s[:rank].mean() * self.scale)
