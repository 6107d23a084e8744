"""Base class of methods that weight task vectors by data statistics measured for each model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from freemerge.checkpoints import Checkpoint, expand, open_checkpoint
from freemerge.errors import MergeError
from freemerge.merging.methods.base import MergeMethod, require, require_number
from freemerge.merging.task_vectors import Vectors

Statistics = Literal["gram_matrices", "squared_gradients", "coefficients"]

_Part = TypeVar("_Part")


@dataclass(frozen=True)
class MeasuredMethod(MergeMethod):
    """A method with a file of statistics for each model.

    Args:
        statistics: the files' paths, in the order of the models: checkpoints of any kind that freemerge reads, with a
            tensor under the name of the weight that it belongs to. A weight without statistics is averaged.
            freemerge_callbacks.StatisticsAtFitEnd writes those of RegMean and FisherMerging. "collect" in a run over a
            suite, which measures them itself before the merge and writes them to `merge/statistics`.
        scale: multiplies the result.
    """

    measures: ClassVar[Statistics]
    """What the statistics are."""

    statistics: list[str] | Literal["collect"] = field(default_factory=list)
    scale: float = 1.0

    def __post_init__(self) -> None:
        listed = isinstance(self.statistics, (list, tuple)) and len(self.statistics) > 0
        valid = listed or self.statistics == "collect"
        require(valid, self, f"`statistics` must list a file for each model, got {self.statistics!r}")
        require_number(self, "scale", self.scale)
        require(not isinstance(self.scale, (list, tuple)), self, "`scale` must be one number for all models")

    def check(self, labels: Sequence[str]) -> None:
        super().check(labels)
        if self.statistics == "collect":
            raise MergeError(
                f'{type(self).__name__}: statistics="collect" is for runs over a suite (fit, tune), which have data; '
                f"list a file with the {self.measures.replace('_', ' ')} of each model, as a run writes them to "
                "merge/statistics"
            )
        if len(self.statistics) != len(labels):
            raise MergeError(
                f"{type(self).__name__} has {len(self.statistics)} files in `statistics` for {len(labels)} fine-tuned "
                "models; give one per model, in their order"
            )

    @property
    def collected_as(self) -> str:
        """The name of the statistics in a run's files; methods whose statistics are the same have the same one."""
        return self.measures

    def measured_shape(self, shape: torch.Size) -> torch.Size | None:
        """The shape of the statistics of a weight of this shape; None if it has none."""
        raise NotImplementedError

    def collect_statistics(self, vectors: Vectors) -> list[Checkpoint]:
        """Open the files, and check names and shapes; values are read tensor by tensor.

        Raises:
            MergeError: the files name different weights, or none of the model's, or have another shape.
        """
        files = [open_checkpoint(expand(path)) for path in self.statistics]
        named = [{name for name in vectors.shapes if file.has(name)} for file in files]
        every = set().union(*named)
        if vectors.shapes and not every:
            raise MergeError(f"{files[0].label}: has no statistics of any merged weight")
        for file, names in zip(files, named, strict=True):
            if missing := sorted(every - names):
                raise MergeError(
                    f"{file.label}: has no statistics of '{missing[0]}', which another model's file has; measure "
                    "the same weights for all models"
                )
            for name in names:
                expected, found = self.measured_shape(vectors.shapes[name]), file.spec(name).shape
                if expected is None or tuple(found) != tuple(expected):
                    raise MergeError(
                        f"{file.label}: the statistics of '{name}' have shape {list(found)}, expected "
                        f"{'none' if expected is None else list(expected)} for {type(self).__name__} of a weight of "
                        f"shape {list(vectors.shapes[name])}"
                    )
        return files


def collected(part: _Part, paths: Callable[[MeasuredMethod], list[str]]) -> _Part:
    """The same method with files in place of "collect", in methods inside of it, too.

    Args:
        part: a method.
        paths: a method with "collect" → the files of its statistics, in the order of the models.
    """
    if isinstance(part, MeasuredMethod) and part.statistics == "collect":
        return dataclasses.replace(part, statistics=paths(part))
    if isinstance(part, Mapping):
        values: Any = {key: collected(value, paths) for key, value in part.items()}
        return part if values == part else values
    if not isinstance(part, MergeMethod) or not dataclasses.is_dataclass(part):
        return part
    own = {each.name: getattr(part, each.name) for each in dataclasses.fields(part) if each.init}
    changed = {name: new for name, value in own.items() if (new := collected(value, paths)) is not value}
    return dataclasses.replace(part, **changed) if changed else part


def read_values(file: Checkpoint, values: Tensor, name: str) -> Tensor:
    """Convert statistics to float32 and check that all are finite.

    Args:
        file: their file, for messages.
        values: the stored values.
        name: name of the weight.
    """
    values = values.to(torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise MergeError(f"{file.label}: the statistics of '{name}' have NaN or infinite values; measure them again")
    return values
