"""The algebra of task vectors in memory, τ = θ_ft − θ_base: compute, merge, and add to a base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from freemerge.checkpoints.buffers import is_statistic
from freemerge.checkpoints.memory import find_tied, flat_range
from freemerge.errors import MergeError
from freemerge.merging.engine.combiner import Combiner
from freemerge.merging.methods.base import MergeMethod
from freemerge.merging.task_vectors import Vectors
from freemerge.tensors.chunks import Chunk
from freemerge.tensors.differences import add, differences


def task_vector(base: Mapping[str, Tensor], finetuned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """τ = θ_ft − θ_base over the floating-point tensors of the base.

    Args:
        base: the pretrained model's tensors.
        finetuned: the fine-tuned model's tensors; names that the base does not have are ignored.

    Returns:
        name → float32 tensor of the base's shape, in new memory. Names that are tied in both models stay tied.

    Raises:
        MergeError: a tensor is missing from `finetuned` or has another shape.
    """
    vector: dict[str, Tensor] = {}
    tied, theirs = find_tied(base), find_tied(finetuned)
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
        first = tied.get(name)
        if first is not None and theirs.get(name, name) == theirs.get(first, first):  # tied in both
            vector[name] = vector[first]
        else:
            vector[name] = differences(tensor, [other])[0]
    return vector


def apply_task_vector(
    base: Mapping[str, Tensor], vector: Mapping[str, Tensor], scale: float = 1.0
) -> dict[str, Tensor]:
    """θ = θ_base + scale · τ, in float32 and returned in the base's dtypes.

    Batch-norm statistics are interpolated between the base's and the fine-tuned ones: for them, λ is clamped to [0, 1].

    Args:
        base: the pretrained model's tensors.
        vector: name → task vector of the base's shape; tensors of the base that it does not name stay as they are.
        scale: λ.

    Returns:
        All tensors of the base, in new memory.

    Raises:
        MergeError: `vector` names a tensor that the base does not have, or has another shape; or a value is NaN or
            infinite, or overflows the base's dtype.
    """
    for name, delta in vector.items():
        if name not in base:
            raise MergeError(f"the task vector has a tensor '{name}', which the base does not have")
        if delta.shape != base[name].shape:
            raise MergeError(
                f"the tensor '{name}' has shape {list(delta.shape)} in the task vector and {list(base[name].shape)} in "
                "the base"
            )
    scales = {False: scale, True: min(max(scale, 0.0), 1.0)}
    return {
        name: add(name, tensor, scales[is_statistic(name)] * vector[name].to(tensor.device))
        if name in vector
        else tensor.detach().clone()
        for name, tensor in base.items()
    }


def merge_task_vectors(vectors: Sequence[Mapping[str, Tensor]], method: MergeMethod) -> dict[str, Tensor]:
    """Merge task vectors that are in memory.

    Args:
        vectors: one mapping per task, all with the same names and shapes.
        method: how to merge.

    Returns:
        name → merged task vector, float32, in new memory.

    Raises:
        MergeError: no vectors, names or shapes that differ, or a value of the result is NaN or infinite.
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

    def read_chunk(chunk: Chunk) -> Tensor:
        return torch.stack(
            [flat_range(vector[chunk.name].detach(), *chunk[1:]).to(torch.float32) for vector in vectors]
        )

    labels = [f"task {index}" for index in range(len(vectors))]
    statistics = frozenset(filter(is_statistic, first))
    source = Vectors(labels, {name: delta.shape for name, delta in first.items()}, read, read_chunk)
    method.check(source.labels)
    combiner = Combiner.of(method, source, statistics)
    return {name: combiner.difference(name, deltas) for name, deltas in source}
