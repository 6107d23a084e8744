"""Order statistics of magnitudes: the thresholds of methods that keep the largest entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from freemerge.merging.task_vectors import Vectors
from freemerge.tensors.order_statistics import Scan, order_statistics


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
