"""Different methods for different tensors of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from freemerge.merging.errors import MergeError
from freemerge.merging.method import MergeMethod, require, require_number
from freemerge.merging.patterns import compile_patterns
from freemerge.merging.vectors import Vectors


class PatternStatistics(NamedTuple):
    """What each method has to know of the tensors that are its own."""

    inner: tuple[Any, ...]


@dataclass(frozen=True)
class PerPattern(MergeMethod):
    """Merge a tensor with the method of the first pattern that matches its name, or else with the default.

    A global method (PCB, TIES) counts its own tensors only. Each method makes its passes over its own tensors.

    Args:
        default: what merges the tensors that no pattern matches.
        overrides: pattern → method. Globs, or regular expressions after `re:`, for whole names; the first match counts.
        scale: multiplies the result.
    """

    default: MergeMethod
    overrides: dict[str, MergeMethod] = field(default_factory=dict)
    scale: float = 1.0

    def __post_init__(self) -> None:
        for method in (self.default, *self.overrides.values()):
            require(isinstance(method, MergeMethod), self, f"expected a MergeMethod, got {method!r}")
        require_number(self, "scale", self.scale)
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

    def check(self, labels: Sequence[str]) -> None:
        super().check(labels)
        for method in self._methods:
            method.check(labels)

    def survey(self, vectors: Vectors) -> PatternStatistics:
        """Let each method survey the tensors that are its own.

        Raises:
            MergeError: a pattern matches none of the merged tensors.
        """
        own: list[list[str]] = [[] for _ in self._methods]
        for name in vectors.shapes:
            own[self._index(name)].append(name)
        for pattern, names in zip(self.overrides, own, strict=False):
            if vectors.shapes and not names:
                raise MergeError(f"overrides: the pattern '{pattern}' matches no tensor that is left to it")
        pairs = zip(self._methods, own, strict=True)
        return PatternStatistics(tuple(method.survey(vectors.subset(names)) for method, names in pairs))

    def combine(self, name: str, deltas: Tensor, statistics: PatternStatistics) -> Tensor:
        index = self._index(name)
        return self._methods[index].combine(name, deltas, statistics.inner[index]) * self.scale

    def _index(self, name: str) -> int:
        """The position among `_methods` of the one that merges a tensor."""
        matches = (index for index, pattern in enumerate(self._patterns) if pattern.fullmatch(name))
        return next(matches, len(self._patterns))
