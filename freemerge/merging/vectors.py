"""Task vectors: what fine-tuning added to a base, τ = θ_ft − θ_base.

- The algebra in memory: `task_vector`, `apply_task_vector`, `merge_task_vectors`.
- `Vectors`: the task vectors of K models seen tensor by tensor, as many times as a method needs.

Notation: K models, D merged parameters in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from freemerge.merging.errors import MergeError

if TYPE_CHECKING:
    from freemerge.merging.method import MergeMethod


class Vectors:
    """The task vectors of K models, one tensor at a time; iterating again reads again.

    Args:
        labels: the names of the K models.
        shapes: name → shape of each merged tensor, in the order of iteration.
        read: returns the task vectors of one tensor, (K, *shape) float32, in memory of their own.
    """

    def __init__(
        self, labels: Sequence[str], shapes: Mapping[str, Sequence[int]], read: Callable[[str], Tensor]
    ) -> None:
        self.labels = tuple(labels)
        self.shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        self._read = read

    @property
    def numel(self) -> int:
        """D, the number of merged parameters of one model."""
        return sum(shape.numel() for shape in self.shapes.values())

    def read(self, name: str) -> Tensor:
        """The task vectors of one tensor, (K, *shape) float32."""
        return self._read(name)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.shapes:
            yield name, self._read(name)

    def __len__(self) -> int:
        return len(self.shapes)


def task_vector(base: Mapping[str, Tensor], finetuned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """τ = θ_ft − θ_base over the floating-point tensors of the base.

    Args:
        base: the pretrained model's tensors.
        finetuned: the fine-tuned model's tensors; names that the base does not have are ignored.

    Returns:
        name → float32 tensor of the base's shape, in memory of its own.

    Raises:
        MergeError: a tensor is missing from `finetuned` or has another shape.
    """
    vector = {}
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            continue
        if name not in finetuned:
            raise MergeError(f"the fine-tuned model has no tensor '{name}', which the base has")
        other = finetuned[name]
        if other.shape != tensor.shape:
            raise MergeError(
                f"the tensor '{name}' has shape {list(other.shape)} in the fine-tuned model and {list(tensor.shape)} "
                "in the base"
            )
        vector[name] = difference(tensor, other)
    return vector


def apply_task_vector(
    base: Mapping[str, Tensor], vector: Mapping[str, Tensor], scale: float = 1.0
) -> dict[str, Tensor]:
    """θ = θ_base + scale · τ, in float32 and returned in the base's dtypes.

    Args:
        base: the pretrained model's tensors.
        vector: name → task vector of the base's shape; tensors of the base that it does not name stay as they are.
        scale: λ.

    Returns:
        All tensors of the base, in memory of their own.

    Raises:
        MergeError: `vector` names a tensor that the base does not have, or has another shape.
    """
    for name, delta in vector.items():
        if name not in base:
            raise MergeError(f"the task vector has a tensor '{name}', which the base does not have")
        if delta.shape != base[name].shape:
            raise MergeError(
                f"the tensor '{name}' has shape {list(delta.shape)} in the task vector and {list(base[name].shape)} in "
                "the base"
            )
    return {
        name: add(tensor, scale * vector[name].to(tensor.device)) if name in vector else tensor.detach().clone()
        for name, tensor in base.items()
    }


def merge_task_vectors(vectors: Sequence[Mapping[str, Tensor]], method: MergeMethod) -> dict[str, Tensor]:
    """Merge task vectors that are in memory.

    Args:
        vectors: one mapping per task, all with the same names and shapes.
        method: how to merge.

    Returns:
        name → merged task vector, float32, in memory of its own.

    Raises:
        MergeError: no vectors, or names or shapes that differ.
    """
    if not vectors:
        raise MergeError("there are no task vectors to merge")
    first = vectors[0]
    for index, vector in enumerate(vectors[1:], start=1):
        if differing := sorted(vector.keys() ^ first.keys()):
            raise MergeError(f"task vectors 0 and {index} differ in their tensors, first in '{differing[0]}'")
        for name, delta in vector.items():
            if delta.shape != first[name].shape:
                raise MergeError(
                    f"the tensor '{name}' has shape {list(delta.shape)} in task vector {index} and "
                    f"{list(first[name].shape)} in task vector 0"
                )

    def read(name: str) -> Tensor:
        return torch.stack([vector[name].detach().to(torch.float32) for vector in vectors])

    source = Vectors(
        [f"task {index}" for index in range(len(vectors))], {name: delta.shape for name, delta in first.items()}, read
    )
    method.check(source.labels)
    statistics = method.survey(source)
    return {name: method.combine(name, deltas, statistics) for name, deltas in source}


def difference(base: Tensor, finetuned: Tensor) -> Tensor:
    """θ_ft − θ_base in float32 (float64 operands are subtracted in float64), always in new memory."""
    dtype = working_dtype(base.dtype, finetuned.dtype)
    delta = finetuned.detach().to(base.device, dtype) - base.detach().to(dtype)
    return delta.to(torch.float32)


def add(base: Tensor, delta: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """θ_base + τ in float32 (float64 for a float64 base), rounded once, to `dtype` or the base's; in new memory."""
    return (base.detach().to(working_dtype(base.dtype)) + delta).to(dtype or base.dtype)


def working_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 if any dtype is float64, else float32: narrower types are never computed in."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
