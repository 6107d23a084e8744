"""Different methods, or different parameters of one, for different tensors of a model."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from freemerge.errors import MergeError, MergeWarning
from freemerge.merging.methods.base import MergeMethod, require, require_number
from freemerge.merging.methods.parameters import replace_fields
from freemerge.merging.task_vectors import Vectors
from freemerge.tensors.patterns import compile_patterns


class PatternStatistics(NamedTuple):
    """The statistics of each method for its own tensors."""

    inner: tuple[Any, ...]


@dataclass(frozen=True)
class PerPattern(MergeMethod):
    """Merge a tensor with the method of the first pattern that matches its name, or else with the default.

    The statistics of a global method (PCB, TIES) cover only its own tensors; methods with equal `statistics_key` (they
    often differ only in λ) share statistics over all their tensors.

    Args:
        default: merges the tensors that no pattern matches.
        overrides: pattern → method. Globs, or regular expressions after `re:`, for whole names; the first match is
            used.
        scale: multiplies the result.
        optional: allow patterns that match no tensor; otherwise they are an error, as they are usually misspelt.
    """

    statistics_fields: ClassVar = ("default", "overrides")
    linear_in_scale: ClassVar = True

    default: MergeMethod
    overrides: dict[str, MergeMethod] = field(default_factory=dict)
    scale: float = 1.0
    optional: bool = False

    def __post_init__(self) -> None:
        for method in (self.default, *self.overrides.values()):
            require(isinstance(method, MergeMethod), self, f"expected a MergeMethod, got {method!r}")
        require_number(self, "scale", self.scale)
        require(isinstance(self.optional, bool), self, f"`optional` must be true or false, got {self.optional!r}")
        compile_patterns(list(self.overrides), "overrides")

    @cached_property
    def _patterns(self):
        return list(compile_patterns(list(self.overrides), "overrides").values())

    @property
    def _methods(self) -> tuple[MergeMethod, ...]:
        return (*self.overrides.values(), self.default)

    @property
    def elementwise(self) -> bool:
        return all(method.elementwise for method in self._methods)

    @property
    def finishes(self) -> bool:
        return any(method.finishes for method in self._methods)

    def extra_copies(self, models: int) -> int:
        return max(method.extra_copies(models) for method in self._methods)

    @property
    def passes(self) -> int:
        return max(method.passes for method in self._methods)

    def check(self, labels: Sequence[str]) -> None:
        super().check(labels)
        for method in self._methods:
            method.check(labels)

    def collect_statistics(self, vectors: Vectors) -> PatternStatistics:
        """Collect each method's statistics over its own tensors.

        Raises:
            MergeError: a pattern matches none of the merged tensors.
        """
        own: list[list[str]] = [[] for _ in self._methods]
        for name in vectors.shapes:
            own[self._index(name)].append(name)
        for pattern, compiled, names in zip(self.overrides, self._patterns, own, strict=False):
            if vectors.shapes and not names and not self.optional:
                raise MergeError(
                    f"overrides: the pattern '{pattern}' matches no tensor that is left by earlier patterns"
                )
            if not names and not pattern.startswith("re:") and not any(map(compiled.fullmatch, vectors.names)):
                warnings.warn(f"overrides: the pattern '{pattern}' matches no tensor", MergeWarning, stacklevel=2)
        return PatternStatistics(tuple(collect_each(list(zip(self._methods, own, strict=True)), vectors)))

    def combine(self, name: str, deltas: Tensor, statistics: PatternStatistics) -> Tensor:
        index = self._index(name)
        return self._methods[index].combine(name, deltas, statistics.inner[index]) * self.scale

    def combine_chunk(self, name: str, start: int, deltas: Tensor, statistics: PatternStatistics) -> Tensor:
        index = self._index(name)
        merged = self._methods[index].combine_chunk(name, start, deltas, statistics.inner[index])
        return merged if self.finishes else merged * self.scale

    def finish(self, name: str, merged: Tensor) -> Tensor:
        return self._methods[self._index(name)].finish(name, merged) * self.scale

    def _index(self, name: str) -> int:
        """The index in `_methods` of the method that merges a tensor."""
        found = self._indices.get(name)
        if found is None:  # matched once for each tensor, not for each of its chunks
            matches = (index for index, pattern in enumerate(self._patterns) if pattern.fullmatch(name))
            found = self._indices[name] = next(matches, len(self._patterns))
        return found

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {}


def collect_each(groups: Sequence[tuple[MergeMethod, Sequence[str]]], vectors: Vectors) -> list[Any]:
    """The statistics of several methods, each over its own tensors.

    Args:
        groups: methods, each with the names of its tensors. Methods with equal `statistics_key` share statistics over
            the tensors of all of them.
        vectors: the task vectors.
    """
    shared: dict[Hashable, set[str]] = {}
    keys = [method.statistics_key for method, _ in groups]
    for key, (_, names) in zip(keys, groups, strict=True):
        shared.setdefault(key, set()).update(names)
    found: dict[Hashable, Any] = {}
    for key, (method, _) in zip(keys, groups, strict=True):
        if key not in found:
            seen = shared[key]
            found[key] = method.collect_statistics(vectors.subset(name for name in vectors.shapes if name in seen))
    return [found[key] for key in keys]


def with_overrides(method: MergeMethod, overrides: Sequence[Mapping[str, Any]] | None) -> MergeMethod:
    """The method with other parameters for some of the tensors.

    Args:
        method: how to merge.
        overrides: one mapping for each pattern: `match`, the pattern (a glob, or a regular expression after `re:`), and
            parameters of the method, those of its parts by dotted path: `{"match": "*.mlp.*", "scale": 0.4,
            "filter.cutoff": 0.2}`. The first match is used. Statistics of the whole model stay shared, unless
            parameters that they depend on differ.

    Returns:
        A `PerPattern`, or the method itself where there are no overrides.

    Raises:
        MergeError: a mapping without `match`, a pattern twice, or a parameter that the method does not have.
        ValueError: the method refuses a value.
    """
    if not overrides:
        return method
    methods: dict[str, MergeMethod] = {}
    for index, override in enumerate(overrides):
        parameters = dict(override)
        pattern = parameters.pop("match", None)
        if not isinstance(pattern, str):
            raise MergeError(f"overrides[{index}]: needs a pattern of tensor names, match: '*.mlp.*'")
        if pattern in methods:
            raise MergeError(f"overrides[{index}]: the pattern '{pattern}' is given twice")
        if not parameters:
            raise MergeError(f"overrides[{index}]: names no parameter to change, such as scale: 0.4")
        try:
            methods[pattern] = replace_fields(method, parameters)
        except MergeError as error:
            raise MergeError(f"overrides[{index}]: {error}") from None
    return PerPattern(method, methods)
