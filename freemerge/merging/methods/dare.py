"""DARE: drop most entries of the task vectors at random, rescale the rest (Yu et al., ICML 2024, arXiv 2311.03099)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from freemerge.merging.methods.base import MergeMethod, each_of, require, require_number
from freemerge.merging.task_vectors import Vectors
from freemerge.tensors.chunks import Chunk

_PER_COUNTER = 16  # 16-bit numbers in one Philox block


class DareStatistics(NamedTuple):
    """The models whose masks are drawn, and the statistics of the inner method."""

    labels: tuple[str, ...]
    inner: Any


@dataclass(frozen=True)
class Dare(MergeMethod):
    """Thin vectors for another method: v_k ← m_k ⊙ v_k / (1 − drop), entries of m_k are zero with probability `drop`.

    The expectation of each entry is unchanged. A mask depends only on the seed, the model's name and the tensor's name:
    not on the order of the models, nor on which other tensors are merged. As many passes as the inner method.

    Args:
        method: merges the thinned task vectors.
        drop: probability of dropping an entry, in [0, 1), one for all models or one per model.
        scale: multiplies the result.
        seed: seed of the masks.
    """

    statistics_fields: ClassVar = ("method", "drop", "seed")
    linear_in_scale: ClassVar = True

    method: MergeMethod
    drop: float | list[float] = 0.9
    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_number(self, "drop", self.drop)
        inside = all(0 <= drop < 1 for drop in each_of(self.drop, 1))
        require(inside, self, f"`drop` must lie in [0, 1), got {self.drop}")
        require(isinstance(self.method, MergeMethod), self, f"`method` must be a MergeMethod, got {self.method!r}")
        require_number(self, "scale", self.scale)
        require(isinstance(self.seed, int), self, f"`seed` must be an integer, got {self.seed!r}")

    def check(self, labels: Sequence[str]) -> None:
        super().check(labels)
        self.method.check(labels)

    @property
    def elementwise(self) -> bool:
        return self.method.elementwise

    @property
    def finishes(self) -> bool:
        return self.method.finishes

    def extra_copies(self, models: int) -> int:
        return self.method.extra_copies(models)

    @property
    def passes(self) -> int:
        return self.method.passes

    def collect_statistics(self, vectors: Vectors) -> DareStatistics:
        """Collect the inner method's statistics on the thinned vectors."""

        def thin(name: str, deltas: Tensor) -> Tensor:
            return self._thin(name, 0, deltas, vectors.labels)

        def thin_chunk(chunk: Chunk, deltas: Tensor) -> Tensor:
            return self._thin(chunk.name, chunk.start, deltas, vectors.labels)

        return DareStatistics(vectors.labels, self.method.collect_statistics(vectors.through(thin, thin_chunk)))

    def combine(self, name: str, deltas: Tensor, statistics: DareStatistics) -> Tensor:
        thinned = self._thin(name, 0, deltas, statistics.labels)
        return self.method.combine(name, thinned, statistics.inner) * self.scale

    def combine_chunk(self, name: str, start: int, deltas: Tensor, statistics: DareStatistics) -> Tensor:
        thinned = self._thin(name, start, deltas, statistics.labels)
        return self.method.combine_chunk(name, start, thinned, statistics.inner) * (1 if self.finishes else self.scale)

    def finish(self, name: str, merged: Tensor) -> Tensor:
        return self.method.finish(name, merged) * self.scale

    def _thin(self, name: str, start: int, deltas: Tensor, labels: Sequence[str]) -> Tensor:
        """Thin (K, *shape), or (K, n) from position `start` on, in place."""
        for delta, label, drop in zip(deltas, labels, each_of(self.drop, len(labels)), strict=True):
            kept = draw_mask(f"{self.seed}|{len(label)}|{label}|{name}", start, delta.numel(), 1 - drop)
            kept = kept.view(delta.shape)
            if delta.device.type == "cpu":
                np.multiply(delta.numpy(), kept.numpy(), out=delta.numpy())  # torch would convert the mask first
            else:
                delta.mul_(kept.to(delta.device))
            delta.div_(1 - drop)
        return deltas


def draw_mask(text: str, start: int, count: int, keep: float) -> Tensor:
    """The values `start` to `start + count` of an endless random mask that belongs to a text.

    Philox is a function of key and counter: any chunk of the mask can be drawn separately, on any machine, and NumPy
    keeps the stream stable across versions. 16 bits decide about each value; if they are a tie, once in 2¹⁶ times, 64
    bits of another stream decide.

    Args:
        text: identifies the mask.
        start: position of the first value.
        count: number of values.
        keep: probability of a True.

    Returns:
        (count,) bool, on the CPU.
    """
    if keep >= 1:
        return torch.ones(count, dtype=torch.bool)
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    first = start // _PER_COUNTER
    skipped = start - first * _PER_COUNTER
    words = np.random.Philox(key=key, counter=first).random_raw(-(-(skipped + count) // 4))
    values = words.astype("<u8", copy=False).view("<u2")[skipped : skipped + count]
    bound = int(keep * 2**16)
    mask = values < bound
    for index in np.flatnonzero(values == bound).tolist():
        more = np.random.Philox(key=(key + 1) % 2**128, counter=start + index).random_raw()
        mask[index] = bound + int(more) / 2**64 < keep * 2**16
    return torch.from_numpy(mask)


def draw_uniform(text: str, start: int, count: int) -> Tensor:
    """The values `start` to `start + count` of an endless stream of random numbers that belongs to a text.

    As `draw_mask`, with 32 bits for each.

    Args:
        text: identifies the stream.
        start: position of the first value.
        count: number of values.

    Returns:
        (count,) float64 in [0, 1), on the CPU.
    """
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    first, skipped = divmod(start, _PER_COUNTER // 2)
    words = np.random.Philox(key=key, counter=first).random_raw(-(-(skipped + count) // 2))
    values = words.astype("<u8", copy=False).view("<u4")[skipped : skipped + count]
    return torch.from_numpy(values * 2.0**-32)
