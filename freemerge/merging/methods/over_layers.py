"""Parameters that change over the layers of a model, from the first to the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from freemerge.checkpoints.naming.layers import count_layers, is_before, split_layer
from freemerge.merging.methods.base import MergeMethod, require, require_number
from freemerge.merging.methods.parameters import get_field, replace_fields
from freemerge.merging.methods.per_pattern import collect_each
from freemerge.merging.task_vectors import Vectors


class LayerStatistics(NamedTuple):
    """The statistics of the method at each depth, and the depth of each tensor."""

    depths: dict[str, float]
    inner: dict[float, Any]


@dataclass(frozen=True)
class OverLayers(MergeMethod):
    """Merge each tensor by a method whose parameters depend on the tensor's layer: gradients over the layers.

    Layer l of L has the depth l/(L − 1), 1 if it is the only one. Embeddings have the depth 0, all other tensors
    outside the layers `end`. A parameter with the values x_0 … x_m is interpolated linearly: x_i at the depth i/m.

    Args:
        method: the method.
        values: path of a parameter → its values from the first layer to the last: `scale`, `method.drop` for a part's
            own, `scale.0` for that of the first model.
        layers: the first layer and the one after the last, between which the depths lie; None for all layers of the
            merged tensors.
        end: the depth of tensors after the layers, such as the last norm and the output head. mergekit 0.1 gives them
            the first value, 0; 0.0 gave them the last.
    """

    statistics_fields: ClassVar = ("method", "values", "layers", "end")

    method: MergeMethod
    values: dict[str, list[float]] = field(default_factory=dict)
    layers: list[int] | None = None
    end: float = 1.0

    def __post_init__(self) -> None:
        require(isinstance(self.method, MergeMethod), self, f"`method` must be a MergeMethod, got {self.method!r}")
        for path, values in self.values.items():
            require(isinstance(values, (list, tuple)), self, f"`values` of '{path}' must be a list, got {values!r}")
            require_number(self, f"values.{path}", values)
            get_field(self.method, path)
        if self.layers is not None:
            valid = len(self.layers) == 2 and 0 <= self.layers[0] < self.layers[1]
            require(valid, self, f"`layers` must be the first layer and the one after the last, got {self.layers}")
        require_number(self, "end", self.end)
        require(0 <= self.end <= 1, self, f"`end` must lie in [0, 1], got {self.end}")
        for depth in sorted(self._knots, reverse=True):  # refuses values that the method refuses
            self._at(depth)

    @property
    def elementwise(self) -> bool:
        return self.method.elementwise and not self.method.finishes  # `finish` does not know the tensor's depth

    def extra_copies(self, models: int) -> int:
        return max(self._at(depth).extra_copies(models) for depth in self._knots)

    @property
    def passes(self) -> int:
        return max(self._at(depth).passes for depth in self._knots)

    def check(self, labels: Sequence[str]) -> None:
        super().check(labels)
        self.method.check(labels)

    def collect_statistics(self, vectors: Vectors) -> LayerStatistics:
        """Collect the statistics of the method at each depth over the tensors of that depth."""
        found = find_depths(vectors.names, self.layers, self.end)
        groups: dict[float, list[str]] = {}
        for name in vectors.shapes:
            groups.setdefault(found[name], []).append(name)
        inner = collect_each([(self._at(depth), names) for depth, names in groups.items()], vectors)
        return LayerStatistics({name: found[name] for name in vectors.shapes}, dict(zip(groups, inner, strict=True)))

    def combine(self, name: str, deltas: Tensor, statistics: LayerStatistics) -> Tensor:
        depth = statistics.depths[name]
        return self._at(depth).combine(name, deltas, statistics.inner[depth])

    def combine_chunk(self, name: str, start: int, deltas: Tensor, statistics: LayerStatistics) -> Tensor:
        depth = statistics.depths[name]
        return self._at(depth).combine_chunk(name, start, deltas, statistics.inner[depth])

    def _at(self, depth: float) -> MergeMethod:
        """The method with its parameters at a depth."""
        if depth not in self._methods:
            values = {path: _interpolate(values, depth) for path, values in self.values.items()}
            self._methods[depth] = replace_fields(self.method, values)
        return self._methods[depth]

    @cached_property
    def _knots(self) -> set[float]:
        """The depths at which a value is given, and the first and the last."""
        given = {index / max(len(values) - 1, 1) for values in self.values.values() for index in range(len(values))}
        return {*given, 0.0, 1.0}

    @cached_property
    def _methods(self) -> dict[float, MergeMethod]:
        return {}


def find_depths(names: Sequence[str], layers: Sequence[int] | None = None, end: float = 1.0) -> dict[str, float]:
    """The depth of each tensor in its model, from 0 for the first layer to 1 for the last.

    The first number in a name is its layer's; each stack of layers (`encoder.layers`, `decoder.layers`) has depths of
    its own.

    Args:
        names: the names of the model's tensors.
        layers: the first layer and the one after the last; None for those of each stack.
        end: the depth of tensors after the layers.
    """
    counts = count_layers(names)
    found: dict[str, float] = {}
    for name in names:
        place = split_layer(name)
        if place is None:
            found[name] = 0.0 if is_before(name) else end
            continue
        first, stop = (0, counts[place.stack]) if layers is None else layers
        index = min(max(place.layer, first), stop - 1)
        found[name] = (index - first) / (stop - first - 1) if stop - first > 1 else 1.0
    return found


def _interpolate(values: Sequence[float], depth: float) -> float:
    place = depth * (len(values) - 1)
    index = min(int(place), max(len(values) - 2, 0))
    part = place - index
    after = values[min(index + 1, len(values) - 1)]
    return values[index] if part == 0 else (1 - part) * values[index] + part * after
