"""Weighted sums of experts of different kinds, or of a kind that has no exact sum (`MIXES`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from freemerge.experts.base import Expert
from freemerge.experts.tied import names_of_changes
from freemerge.tensors.differences import working_dtype


class Mixture:
    """Σ w_k · expert_k, evaluated tensor by tensor while a model runs.

    Args:
        experts: experts of any kinds, unpacked.
        weights: w_k.
        live: name → tensor of the model; tied ones under each of their names.

    Attributes:
        shapes: tensor name → shape, of all tensors that an expert changes.
        metadata: the tasks of all experts, for messages.
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
        """The sum of a weight and Σ w_k · (what expert k adds to it).

        Args:
            name: the model's name of the tensor, one of `shapes`.
            weight: (*shape), the merged tensor.

        Returns:
            A tensor with the shape and dtype of `weight`, formed in float32 and rounded once.
        """
        wide = weight.to(working_dtype(weight.dtype))
        total = wide
        for expert, factor, names in self._parts:
            if name in names:
                total = total + factor * (expert.added(names[name], wide) - wide)
        return total.to(weight.dtype)
