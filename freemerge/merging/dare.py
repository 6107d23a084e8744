"""DARE: drop most entries of the task vectors at random, rescale the rest (Yu et al., ICML 2024, arXiv 2311.03099)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from freemerge.merging.method import MergeMethod, require, require_number
from freemerge.merging.vectors import Vectors


class DareStatistics(NamedTuple):
    """Whose masks to draw, and what the method behind needs."""

    labels: tuple[str, ...]
    inner: Any


@dataclass(frozen=True)
class Dare(MergeMethod):
    """Before any other method: v_k ← m_k ⊙ v_k / (1 − drop), with entries of m_k zero with probability `drop`.

    The expectation of each entry stays what it was. A mask depends on the seed, the model's name and the tensor's name
    alone: not on the order of the models, nor on which other tensors are merged. As many passes as the method behind.

    Args:
        method: what merges the thinned task vectors.
        drop: probability of dropping an entry, in [0, 1).
        scale: multiplies the result.
        seed: of the masks.
    """

    method: MergeMethod
    drop: float = 0.9
    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_number(self, "drop", self.drop)
        require(0 <= self.drop < 1, self, f"`drop` must lie in [0, 1), got {self.drop}")
        require(isinstance(self.method, MergeMethod), self, f"`method` must be a MergeMethod, got {self.method!r}")
        require_number(self, "scale", self.scale)
        require(isinstance(self.seed, int), self, f"`seed` must be an integer, got {self.seed!r}")

    def check(self, labels: Sequence[str]) -> None:
        super().check(labels)
        self.method.check(labels)

    def survey(self, vectors: Vectors) -> DareStatistics:
        """Survey the thinned vectors."""
        thinned = Vectors(
            vectors.labels, vectors.shapes, lambda name: self._thin(name, vectors.read(name), vectors.labels)
        )
        return DareStatistics(vectors.labels, self.method.survey(thinned))

    def combine(self, name: str, deltas: Tensor, statistics: DareStatistics) -> Tensor:
        thinned = self._thin(name, deltas, statistics.labels)
        return self.method.combine(name, thinned, statistics.inner) * self.scale

    def _thin(self, name: str, deltas: Tensor, labels: Sequence[str]) -> Tensor:
        """(K, *shape) → the same, thinned in place."""
        for delta, label in zip(deltas, labels, strict=True):
            digest = hashlib.sha256(f"{self.seed}|{len(label)}|{label}|{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            kept = torch.rand(delta.shape, generator=generator) >= self.drop  # on the CPU: the same on every device
            delta.mul_(kept.to(delta.device)).div_(1 - self.drop)
        return deltas
