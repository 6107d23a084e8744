"""Base class of methods that weight task vectors by data statistics measured for each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from freemerge.checkpoints import Checkpoint, expand, open_checkpoint
from freemerge.errors import MergeError
from freemerge.merging.methods.base import MergeMethod, require, require_number
from freemerge.merging.task_vectors import Vectors


@dataclass(frozen=True)
class MeasuredMethod(MergeMethod):
    """A method with a file of statistics for each model.

    Args:
        statistics: the files' paths, in the order of the models: checkpoints of any kind that freemerge reads, with a
            tensor under the name of the weight that it belongs to. A weight without statistics is averaged.
        scale: multiplies the result.
    """

    statistics: list[str] = field(default_factory=list)
    scale: float = 1.0

    def __post_init__(self) -> None:
        valid = isinstance(self.statistics, (list, tuple)) and len(self.statistics) > 0
        require(valid, self, f"`statistics` must list a file for each model, got {self.statistics!r}")
        require_number(self, "scale", self.scale)
        require(not isinstance(self.scale, (list, tuple)), self, "`scale` must be one number for all models")

    def check(self, labels: Sequence[str]) -> None:
        super().check(labels)
        if len(self.statistics) != len(labels):
            raise MergeError(
                f"{type(self).__name__} has {len(self.statistics)} files in `statistics` for {len(labels)} fine-tuned "
                "models; give one per model, in their order"
            )

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
