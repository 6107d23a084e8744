"""Weighted sums of experts that cannot be one expert: of several kinds, or of a kind that does not mix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from freemerge.experts.base import Expert
from freemerge.experts.tied import names_of_changes
from freemerge.tensors.differences import working_dtype


class Mixture:
    """Σ w_k · expert_k, for a model to compute with.

    Args:
        experts: of any kinds, unpacked.
        weights: w_k.
        live: the model's tensors, tied ones under each of their names.
    """

    def __init__(self, experts: Sequence[Expert], weights: Sequence[float], live: Mapping[str, Tensor]) -> None:
        self._parts = [
            (expert, weight, names_of_changes(live, expert.shapes))  # the model's name → the expert's
            for expert, weight in zip(experts, weights, strict=True)
        ]
        changed = {name for _, _, names in self._parts for name in names}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in live.items() if name in changed}
        self.metadata = {"task": " + ".join(expert.metadata.get("task", "?") for expert in experts)}

    def added(self, name: str, weight: Tensor) -> Tensor:
        """weight + Σ w_k · (what expert k adds to it), formed in float32 and rounded to its dtype once."""
        wide = weight.to(working_dtype(weight.dtype))
        total = wide
        for expert, share, names in self._parts:
            if name in names:
                total = total + share * (expert.added(names[name], wide) - wide)
        return total.to(weight.dtype)
