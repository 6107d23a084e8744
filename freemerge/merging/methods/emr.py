"""EMR-Merging: elect a unified task vector; masks and rescalers bring each task back (arXiv 2405.17461).

Huang et al., NeurIPS 2024. The unified vector is the merge; `emr_task_vector` computes each task's vector from it at
inference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from freemerge.errors import MergeError
from freemerge.merging.methods.base import MergeMethod, require_number


@dataclass(frozen=True)
class EMRMerging(MergeMethod):
    """τ = scale · γ ⊙ max{|v_k| : sign(v_k) = γ}, with the elected signs γ = sign(Σ_k v_k). One pass.

    Each entry is as large as the largest task that agrees with the elected sign, so the unified vector by itself is
    too large for any task: it is meant to be masked and rescaled per task, see `emr_task_vector`.

    Args:
        scale: multiplies the result.
    """

    statistics_fields: ClassVar = ()
    linear_in_scale: ClassVar = True

    scale: float = 1.0

    def __post_init__(self) -> None:
        require_number(self, "scale", self.scale)

    @property
    def elementwise(self) -> bool:
        return True

    def combine(self, name: str, deltas: Tensor, statistics: Any) -> Tensor:
        elected = deltas.sum(0).sign_()
        # v·γ is |v| where the sign agrees, and not positive elsewhere.
        return deltas.mul_(elected).amax(0).clamp_(min=0).mul_(elected).mul_(self.scale)


def emr_task_vector(
    unified: Mapping[str, Tensor], vector: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """One task's vector from the unified vector: λ_k · M_k ⊙ τ.

    M_k keeps the entries whose sign is the task's own, M_k = [v_k ⊙ τ > 0], and λ_k = Σ|v_k| / Σ|M_k ⊙ τ| restores
    the task's mean magnitude.

    Args:
        unified: the result of `EMRMerging` with scale 1, name → float32 tensor.
        vector: the task's own task vector, with the same names and shapes.

    Returns:
        The task vector to apply, name → float32 tensor; the masks M_k, name → bool tensor of the same shape; and λ_k,
        which is 0 if the mask keeps nothing.

    Raises:
        MergeError: names or shapes differ.
    """
    if unified.keys() != vector.keys():
        differing = sorted(unified.keys() ^ vector.keys())
        raise MergeError(f"the unified and the task's own vector differ in their tensors, first in '{differing[0]}'")
    masks = {}
    own, kept = 0.0, 0.0
    for name, tensor in unified.items():
        if vector[name].shape != tensor.shape:
            raise MergeError(
                f"the tensor '{name}' has shape {list(vector[name].shape)} in the task's own vector and "
                f"{list(tensor.shape)} in the unified one"
            )
        masks[name] = torch.sign(vector[name]) * torch.sign(tensor) > 0
        own += float(vector[name].abs().sum(dtype=torch.float64))
        kept += float((tensor.abs() * masks[name]).sum(dtype=torch.float64))
    rescale = own / kept if kept > 0 else 0.0
    return {name: tensor * masks[name] * rescale for name, tensor in unified.items()}, masks, rescale
