"""Weighted sums of experts: what soft routing attaches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from freemerge.experts.base import Expert
from freemerge.experts.kinds.low_rank import LowRankExpert
from freemerge.experts.kinds.sparse import SparseExpert


def mix(experts: Sequence[Expert], weights: Sequence[float]) -> Expert:
    """Σ w_k · expert_k as one expert: exact, of the same kind.

    Args:
        experts: all sparse or all low-rank, for the same model.
        weights: w_k.

    Returns:
        A sparse expert over the union of the supports, or a low-rank one whose ranks add up.

    Raises:
        ValueError: no experts, or kinds that do not mix.
    """
    if not experts or len(experts) != len(weights):
        raise ValueError(f"mix: got {len(experts)} experts and {len(weights)} weights")
    if len(experts) == 1:
        return experts[0].scaled(weights[0])
    if all(isinstance(expert, SparseExpert) for expert in experts):
        return _mix_sparse(experts, weights)
    if all(isinstance(expert, LowRankExpert) for expert in experts):
        return _mix_low_rank(experts, weights)
    kinds = ", ".join(sorted({expert.KIND for expert in experts}))
    raise ValueError(f"mix: experts must all be sparse or all be low-rank to be mixed, got {kinds}")


def _mix_sparse(experts: Sequence[SparseExpert], weights: Sequence[float]) -> SparseExpert:
    shapes = {name: shape for expert in experts for name, shape in expert.shapes.items()}
    indices, values = {}, {}
    for name in shapes:
        own = [(expert, weight) for expert, weight in zip(experts, weights, strict=True) if name in expert.indices]
        index = torch.cat([expert.indices[name] for expert, _ in own])
        value = torch.cat([weight * expert.values[name] for expert, weight in own])
        indices[name], places = index.unique(return_inverse=True)
        values[name] = value.new_zeros(len(indices[name])).index_add_(0, places, value)
    return SparseExpert(indices, values, shapes)


def _mix_low_rank(experts: Sequence[LowRankExpert], weights: Sequence[float]) -> LowRankExpert:
    shapes = {name: shape for expert in experts for name, shape in expert.shapes.items()}
    left, right, whole = {}, {}, {}
    for name, shape in shapes.items():
        own = [(expert, weight) for expert, weight in zip(experts, weights, strict=True) if name in expert.shapes]
        if all(name in expert.left for expert, _ in own):
            left[name] = torch.cat([weight * expert.left[name] for expert, weight in own], dim=1)
            right[name] = torch.cat([expert.right[name] for expert, _ in own])
        else:  # whole in one expert is whole in the sum
            zero = torch.zeros(shape, device=own[0][0].flat_values().device)
            whole[name] = sum((weight * expert.added(name, zero) for expert, weight in own), zero)
    return LowRankExpert(left, right, whole, shapes)
