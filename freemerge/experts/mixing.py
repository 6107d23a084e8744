"""Weighted sums of experts: what soft routing attaches."""

from __future__ import annotations

from collections.abc import Sequence

from freemerge.experts.base import Expert


def mixable(experts: Sequence[Expert]) -> bool:
    """Whether a sum of these is one expert of the same kind."""
    kind = type(experts[0])
    return kind.MIXES and all(type(expert) is kind for expert in experts)


def mix(experts: Sequence[Expert], weights: Sequence[float]) -> Expert:
    """Σ w_k · expert_k as one expert: exact, of the same kind.

    Args:
        experts: all of one kind that mixes, such as sparse or low-rank, for the same model.
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
    if not mixable(experts):
        kinds = ", ".join(sorted({expert.KIND for expert in experts}))
        raise ValueError(f"mix: experts must all be sparse or all be low-rank to be mixed, got {kinds}")
    return type(experts[0]).mixed(experts, weights)
