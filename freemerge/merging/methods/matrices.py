"""Base class of methods for matrices: selects matrix tensors, and optionally filters them before the merge.

- Linear layers and embeddings, (m, n), are matrices; so are convolutions, as dim 0 × the rest.
- Stacked experts, (E, m, n), are E matrices, each merged separately; their biases, (E, n), are E vectors.
- Everything else is averaged.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from freemerge.merging.methods.base import MergeMethod, require, require_number, weighted_sum
from freemerge.merging.methods.filters import Filter
from freemerge.merging.methods.fr import alignment, magnitude
from freemerge.runtime.pages import fresh
from freemerge.runtime.threads import each

# Modules of stacked experts: `mlp.experts.down_proj` (Mixtral, Qwen, gpt-oss), `block_sparse_moe.input_linear`.
_EXPERTS = re.compile(r"(^|[._])(experts?|moe)([._]|$)")
# Lookup tables, whose inputs select one row each, so that input covariances do not apply.
_EMBEDDINGS = re.compile(
    r"(^|\.)(embeddings?|\w*embed_tokens|embed_positions|(?!patch)\w+_embeddings?|wte|wpe|shared|relative_attention_bias)"
    r"(\.weight)?$"
)


@dataclass(frozen=True)
class MatrixMethod(MergeMethod):
    """A method that merges matrices and averages other tensors.

    A subclass defines in `combine_matrix` how K matrices are merged.

    Args:
        scale: multiplies the result.
        filter: a high-pass filter for each task vector's matrices, before anything else (FR-Merging's).
        align: after the filter, bring each task's matrix to the mean magnitude of the largest, as FR-Merging does.
    """

    statistics_fields: ClassVar[tuple[str, ...] | None] = ()

    scale: float = 1.0
    filter: Filter | None = None
    align: bool = False

    def __post_init__(self) -> None:
        require_number(self, "scale", self.scale)
        require(not isinstance(self.scale, (list, tuple)), self, "`scale` must be one number for all models")
        valid = self.filter is None or isinstance(self.filter, Filter)
        require(valid, self, f"`filter` must be a Filter or None, got {self.filter!r}")
        require(isinstance(self.align, bool), self, f"`align` must be true or false, got {self.align!r}")

    def combine(self, name: str, deltas: Tensor, statistics: Any) -> Tensor:
        shape = stack_shape(name, deltas.shape[1:])
        if shape is None or not self.is_merged(name) or deltas[0].numel() == 0:
            return weighted_sum(deltas, self.scale / len(deltas))
        stacks = deltas.reshape(len(deltas), *shape)  # (K, E, m, n), E = 1 for most
        if shape[0] == 1:
            return self._merge(name, stacks[:, 0]).reshape(deltas.shape[1:])
        merged = fresh(shape, deltas.dtype, deltas.device)
        for index, place in enumerate(merged):
            place.copy_(self._merge(name, stacks[:, index].contiguous()))
        return merged.reshape(deltas.shape[1:])

    def is_merged(self, name: str) -> bool:
        """Whether a matrix of this name is merged as a matrix; otherwise it is averaged."""
        return True

    @abstractmethod
    def combine_matrix(self, name: str, matrices: Tensor) -> Tensor:
        """Merge one matrix, without the scale.

        Args:
            name: of the tensor.
            matrices: (K, m, n) float32, contiguous; may be overwritten.

        Returns:
            (m, n) float32.
        """

    def prepare_(self, matrices: Tensor) -> None:
        """Filter and align the task vectors' matrices, (K, m, n) float32, in place."""
        before = each(magnitude, list(matrices)) if self.align else None
        if self.filter is not None:
            each(self.filter.apply_, list(matrices))
        if before is not None:
            after = each(magnitude, list(matrices))
            factors = alignment(*(torch.tensor(values, dtype=torch.float64) for values in (after, before)))
            for matrix, factor in zip(matrices, factors.tolist(), strict=True):
                matrix.mul_(factor)

    def _merge(self, name: str, matrices: Tensor) -> Tensor:
        self.prepare_(matrices)
        return self.combine_matrix(name, matrices).mul_(self.scale)


def stack_shape(name: str, shape: torch.Size) -> tuple[int, int, int] | None:
    """The shape of a tensor as a stack of matrices.

    Args:
        name: name of the tensor, which distinguishes stacked experts from convolutions.
        shape: shape of the tensor.

    Returns:
        (E, m, n), with E = 1 for a single matrix; None if the tensor is not a matrix.
    """
    if len(shape) < 2:
        return None
    if _EXPERTS.search(name):
        if len(shape) == 2 and name.endswith("bias"):
            return None
        if len(shape) == 3:
            return shape[0], shape[1], shape[2]
    return 1, shape[0], shape[1:].numel()


def is_embedding(name: str) -> bool:
    """Whether a tensor is a table of embeddings, by its name."""
    return _EMBEDDINGS.search(name) is not None
