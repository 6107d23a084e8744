"""Masked experts: the task-specific masks and rescalers of EMR-Merging (arXiv 2405.17461).

The backbone is the pretrained base. All tasks share the elected task vector τ, which is stored once; each task has a
mask of one bit per entry and a rescaler: θ_k = θ_base + λ_k · M_k ⊙ τ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from freemerge.experts.base import Expert
from freemerge.merging import EMRMerging, emr_task_vector, merge_task_vectors
from freemerge.tensors.differences import working_dtype


@dataclass(frozen=True)
class MaskedExpert(Expert):
    """One task's mask and rescaler of the task vector that all tasks share.

    Args:
        masks: tensor name → M_k, (⌈n/8⌉,) uint8: one bit per entry, the first entry in the highest bit of a byte.
        rescaler: λ_k, (1,) float32.
        shared: tensor name → τ, (*shape); the same object for all tasks, stored in a file of its own.
        shapes: tensor name → shape.
        metadata: strings stored with the expert.
    """

    masks: dict[str, Tensor]
    rescaler: Tensor
    shared: Mapping[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str] = field(default_factory=dict)

    KIND = "masked"
    SHARES = True

    def parts(self) -> dict[str, Tensor]:
        """The expert's values; see `Expert.parts`."""
        return {"rescaler": self.rescaler}

    def with_parts(self, parts: Mapping[str, Tensor]) -> MaskedExpert:
        """The expert with other values; see `Expert.with_parts`."""
        return replace(self, rescaler=parts["rescaler"].view(1))

    def to(self, device: torch.device | str) -> MaskedExpert:
        """The expert on another device; see `Expert.to`."""
        moved = super().to(device)
        if moved is self:
            return self
        return replace(
            moved,
            masks={name: mask.to(device) for name, mask in self.masks.items()},
            shared={name: tensor.to(device) for name, tensor in self.shared.items()},
        )

    def added(self, name: str, weight: Tensor) -> Tensor:
        """The sum of a weight and the expert; see `Expert.added`."""
        mask = _unpack_bits(self.masks[name], weight.numel()).view(weight.shape)
        wide = weight.to(working_dtype(weight.dtype))
        return (wide + self.rescaler * mask * self.shared[name]).to(weight.dtype)

    def structure(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file needs in addition to the values; see `Expert.structure`."""
        layout = [[name, list(shape)] for name, shape in self.shapes.items()]
        return {"layout": layout}, {"masks": torch.cat([mask.cpu() for mask in self.masks.values()])}

    @classmethod
    def restored(
        cls,
        plain: Mapping[str, Any],
        arrays: Mapping[str, Tensor],
        parts: Mapping[str, Tensor],
        metadata: Mapping[str, str],
    ) -> MaskedExpert:
        """Rebuild an expert without τ, which `load_expert` adds; see `Expert.restored`."""
        shapes = {name: tuple(shape) for name, shape in plain["layout"]}
        sizes = [(math.prod(shape) + 7) // 8 for shape in shapes.values()]
        if sum(sizes) != len(arrays["masks"]):
            raise ValueError("masks do not match the layout")
        masks = dict(zip(shapes, arrays["masks"].split(sizes), strict=True))
        return cls(masks, parts["rescaler"], {}, shapes, dict(metadata))


def emr_experts(vectors: Mapping[str, Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, MaskedExpert]]:
    """EMR-Merging: elect one task vector, then mask and rescale it for each task.

    Args:
        vectors: task → task vector θ_k − θ_base, tensor name → (*shape) float32.

    Returns:
        τ, tensor name → (*shape) float32, and task → expert for the base.

    Raises:
        MergeError: if the names or shapes of the task vectors differ.
    """
    shared = merge_task_vectors(list(vectors.values()), EMRMerging())
    experts = {}
    for task, vector in vectors.items():
        _, masks, rescaler = emr_task_vector(shared, vector)
        experts[task] = MaskedExpert(
            masks={name: _pack_bits(mask) for name, mask in masks.items()},
            rescaler=torch.tensor([rescaler]),
            shared=shared,
            shapes={name: tuple(mask.shape) for name, mask in masks.items()},
            metadata={"task": task},
        )
    return shared, experts


_BITS = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)


def _pack_bits(mask: Tensor) -> Tensor:
    """bool (*shape) → uint8 (⌈n/8⌉,)."""
    flat = mask.reshape(-1)
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
    return (padded * _BITS.to(mask.device)).sum(dim=1, dtype=torch.uint8)


def _unpack_bits(packed: Tensor, count: int) -> Tensor:
    """uint8 (⌈n/8⌉,) → bool (n,)."""
    return (packed[:, None] & _BITS.to(packed.device)).bool().view(-1)[:count]
