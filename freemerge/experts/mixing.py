"""Weighted sums of experts, which soft routing uses."""

from __future__ import annotations

from collections.abc import Sequence

from freemerge.experts.base import Expert


def mixable(experts: Sequence[Expert]) -> bool:
    """Whether a weighted sum of experts is again an expert of their kind.

    Args:
        experts: one expert or more.
    """
    kind = type(experts[0])
    return kind.MIXES and all(type(expert) is kind for expert in experts)


def mix(experts: Sequence[Expert], weights: Sequence[float]) -> Expert:
    """The exact sum Σ w_k · expert_k as one expert.

    Args:
        experts: experts for the same model, all of one kind with `MIXES`, such as sparse or low-rank.
        weights: w_k.

    Returns:
        An expert of the same kind: a sparse one on the union of the supports, or a low-rank one whose rank is the sum
        of the ranks.

    Raises:
        ValueError: if there are no experts, the numbers of experts and weights differ, or the experts cannot be summed.
    """
    if not experts or len(experts) != len(weights):
        raise ValueError(f"mix: got {len(experts)} experts and {len(weights)} weights")
    if len(experts) == 1:
        return experts[0].scaled(weights[0])
    if not mixable(experts):
        kinds = ", ".join(sorted({expert.KIND for expert in experts}))
        raise ValueError(f"mix: experts must all be sparse or all be low-rank to be mixed, got {kinds}")
    return type(experts[0]).mixed(experts, weights)
