"""Order statistics of magnitudes: the thresholds of methods that keep the largest entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from freemerge.merging.task_vectors import Vectors
from freemerge.tensors.order_statistics import Scan, order_statistics


def own_magnitudes(
    vectors: Vectors, scope: str, choices: Sequence[Any], ranks: Callable[[int, Any], Sequence[int]]
) -> Tensor | dict[str, Tensor]:
    """Order statistics of each model's magnitudes |v| at ranks of its own; all models are read together.

    Args:
        vectors: the task vectors of K models.
        scope: over the whole "model", or over each "tensor" separately.
        choices: what the ranks of each of the K models depend on, such as a fraction; hashable.
        ranks: number of values and a choice → R zero-based ranks below it.

    Returns:
        (K, R) float32, on the CPU; with scope "tensor" by name, without tensors that have no values.
    """
    different = list(dict.fromkeys(choices))
    models, places = torch.arange(len(choices)), torch.tensor([different.index(choice) for choice in choices])

    def every(total: int) -> list[int]:
        return [rank for choice in different for rank in ranks(total, choice)]

    def own(found: Tensor) -> Tensor:  # (K, choices · R) → (K, R)
        return found.unflatten(1, (len(different), -1))[models, places]

    if scope == "tensor":
        return {name: own(found) for name, found in tensor_magnitudes(vectors, every).items()}
    return own(model_magnitudes(vectors, every(vectors.numel)))


def model_magnitudes(vectors: Vectors, ranks: Sequence[int]) -> Tensor:
    """Ascending order statistics of each model's magnitudes |v| over all tensors.

    Args:
        vectors: the task vectors of K models, D entries each.
        ranks: R zero-based ranks below D.

    Returns:
        (K, R) float32, on the CPU.
    """
    shape = (len(vectors.labels), vectors.numel)

    def scan(see: Callable[[Tensor], None]) -> None:
        vectors.scan(lambda deltas: see(deltas.abs_()))

    return order_statistics(scan, ranks, shape, vectors.sample().abs_(), vectors.gather)


def tensor_magnitudes(vectors: Vectors, ranks: Callable[[int], Sequence[int]]) -> dict[str, Tensor]:
    """Ascending order statistics of each model's magnitudes |v| in each tensor separately.

    Args:
        vectors: the task vectors of K models.
        ranks: number of values of a tensor → R zero-based ranks below it.

    Returns:
        Name → (K, R) float32, on the CPU; without tensors that have no values.
    """

    def measure(size: int, scan: Scan, sample: Tensor) -> Tensor:
        def scan_magnitudes(see: Callable[[Tensor], None]) -> None:
            scan(lambda deltas: see(deltas.abs_()))

        return order_statistics(scan_magnitudes, ranks(size), (len(vectors.labels), size), sample.abs_())

    return vectors.subset(name for name, shape in vectors.shapes.items() if shape.numel()).by_tensor(measure)
