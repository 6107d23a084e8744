"""DELLA: drop entries at random, small ones more often, rescale the rest (Deep et al., 2024, arXiv 2406.11617)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from freemerge.merging.methods.base import MergeMethod, pairs_of, require, require_number
from freemerge.merging.methods.dare import DareStatistics, draw_uniform
from freemerge.merging.methods.ties import Ties
from freemerge.merging.methods.wrapper import MethodWrapper
from freemerge.merging.task_vectors import Vectors

_BLOCK = 1 << 18  # values ranked at a time


@dataclass(frozen=True)
class Della(MethodWrapper):
    """Preprocess for another method by MagPrune: smaller entries of a row are dropped with higher probability.

    Of a row of n entries, the one whose magnitude is the r-th largest, r from 0 on, is dropped with the probability p_r
    = drop − epsilon/2 + epsilon·r/n, or else divided by 1 − p_r: the expectation of each entry is unchanged. A tensor
    of one dimension is one row, one of more has dim 0 × the rest. As with DARE, the dropped entries depend only on the
    seed, the model's name and the tensor's name. As many passes as the inner method, over whole tensors.

    Args:
        method: merges the thinned task vectors; by default TIES' election and mean without its trimming, as in the
            paper.
        scale: λ, multiplies the result.
        drop: p, the mean probability of dropping an entry, in [0, 1), one for all models or one per model.
        epsilon: ε, the width of the probabilities, the same; p ± ε/2 must lie in [0, 1).
        seed: seed of the random numbers.
    """

    statistics_fields: ClassVar = ("method", "drop", "epsilon", "seed")
    linear_in_scale: ClassVar = True

    method: MergeMethod = field(default_factory=lambda: Ties(density=1.0))
    scale: float = 1.0
    drop: float | list[float] = 0.7
    epsilon: float | list[float] = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "drop", self.drop)
        require_number(self, "epsilon", self.epsilon)
        for drop, epsilon in pairs_of(self.drop, self.epsilon):
            require(epsilon >= 0, self, f"`epsilon` must be at least 0, got {epsilon}")
            inside = drop - epsilon / 2 >= 0 and drop + epsilon / 2 < 1
            require(inside, self, f"`drop` ± `epsilon`/2 must lie in [0, 1), got {drop} ± {epsilon / 2:g}")
        require(isinstance(self.seed, int), self, f"`seed` must be an integer, got {self.seed!r}")

    def collect_statistics(self, vectors: Vectors) -> DareStatistics:
        """Collect the inner method's statistics on the thinned vectors."""
        thinned = vectors.through(lambda name, deltas: self._thin_(name, deltas, vectors.labels))
        return DareStatistics(vectors.labels, self.method.collect_statistics(thinned))

    def combine(self, name: str, deltas: Tensor, statistics: DareStatistics) -> Tensor:
        thinned = self._thin_(name, deltas, statistics.labels)
        return self.method.combine(name, thinned, statistics.inner) * self.scale

    def _thin_(self, name: str, deltas: Tensor, labels: Sequence[str]) -> Tensor:
        """(K, *shape), in place."""
        if deltas[0].numel() == 0:
            return deltas
        rows = deltas.shape[1] if deltas.dim() > 2 else 1
        pairs = pairs_of(self.drop, self.epsilon, len(labels))
        for delta, label, pair in zip(deltas.view(len(deltas), rows, -1), labels, pairs, strict=True):
            text = f"della|{self.seed}|{len(label)}|{label}|{name}"
            columns = delta.shape[1]
            step = max(1, _BLOCK // columns)
            for start in range(0, rows, step):
                block = delta[start : start + step]
                draws = draw_uniform(text, start * columns, block.numel()).view(block.shape).to(block.device)
                _thin_rows_(block, draws, *pair)
        return deltas


def _thin_rows_(rows: Tensor, draws: Tensor, mean: float, width: float) -> None:
    """Thin (R, n) float32 in place, by (R, n) float64 random numbers in [0, 1)."""
    order = rows.abs().argsort(dim=1, descending=True, stable=True)
    steps = torch.arange(rows.shape[1], dtype=torch.float64, device=rows.device) * (width / rows.shape[1])
    drop = torch.empty_like(draws).scatter_(1, order, (mean - width / 2 + steps).expand(rows.shape))
    rows.div_(1 - drop).masked_fill_(draws < drop, 0.0)
