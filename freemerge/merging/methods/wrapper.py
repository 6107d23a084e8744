"""Base class of methods that change the input or the result of another method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from freemerge.merging.methods.base import MergeMethod, require, require_number
from freemerge.merging.task_vectors import Vectors


@dataclass(frozen=True)
class MethodWrapper(MergeMethod):
    """A method around another one.

    Args:
        method: the method inside.
        scale: multiplies the result.
    """

    method: MergeMethod
    scale: float = 1.0

    def __post_init__(self) -> None:
        require(isinstance(self.method, MergeMethod), self, f"`method` must be a MergeMethod, got {self.method!r}")
        require_number(self, "scale", self.scale)

    def extra_copies(self, models: int) -> int:
        return self.method.extra_copies(models)

    @property
    def passes(self) -> int:
        return self.method.passes

    def check(self, labels: Sequence[str]) -> None:
        super().check(labels)
        self.method.check(labels)

    def collect_statistics(self, vectors: Vectors) -> Any:
        """Collect the inner method's statistics on the unchanged vectors."""
        return self.method.collect_statistics(vectors)


def merge_alone(method: MergeMethod, name: str, deltas: Tensor) -> Tensor:
    """Merge a computed tensor, which is not in the models' files, by a method that sees only this tensor.

    Args:
        method: how to merge; statistics over the whole model are taken over this tensor.
        name: its name for the method.
        deltas: (K, *shape) float32; may be overwritten.

    Returns:
        (*shape) float32.
    """
    if deltas[0].numel() == 0:
        return torch.zeros_like(deltas[0])
    labels = [str(index) for index in range(len(deltas))]
    vectors = Vectors(labels, {name: deltas.shape[1:]}, lambda _: deltas.clone())
    return method.combine(name, deltas, method.collect_statistics(vectors))
