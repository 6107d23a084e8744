"""Several classification tasks as one, for pretraining a small backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch.utils.data import Dataset

from freemerge.data.mixture import JoinedDataset
from freemerge.data.sources.source import TaskSource, describe
from freemerge.data.tasks import Task


@dataclass(kw_only=True)
class PooledSource(TaskSource):
    """One task with the training and validation samples, and all classes, of several classification tasks.

    It contains none of their test samples: its own test set is its validation set.

    Args:
        sources: task name → source of its data. The sizes and fractions of the pooled source itself are ignored.
    """

    sources: dict[str, TaskSource] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            raise ValueError("PooledSource: give at least one source")

    def prepare(self) -> None:
        """Let all sources download their data."""
        for source in self.sources.values():
            source.prepare()

    def identity(self) -> dict[str, Any]:
        """What determines the data: the identities of the sources."""
        return {
            "class": describe(type(self)),
            "sources": {key: source.identity() for key, source in self.sources.items()},
        }

    def build(self, name: str, seed: int) -> Task:
        """Build the task from the tasks of all sources.

        Args:
            name: the task's name.
            seed: seed of the sources' splits and subsets.

        Returns:
            A classification whose classes are named `<task>/<class>`.

        Raises:
            ValueError: if a source is not a classification, or cannot be built.
        """
        tasks = [source.build(task, seed) for task, source in self.sources.items()]
        for task in tasks:
            if task.kind != "classification":
                raise ValueError(f"{name}: only classification tasks can be pooled, but {task.name!r} is {task.kind}")
        classes = [f"{task.name}/{label}" for task in tasks for label in task.class_names]
        offsets = [0, *accumulate(task.num_classes for task in tasks)][:-1]
        train, val = (_Pooled([getattr(task, split) for task in tasks], offsets) for split in ("train", "val"))
        return Task(name, tuple(classes), train, val, val)


class _Pooled(JoinedDataset):
    """A concatenation of datasets whose labels are offset, so that classes of different datasets stay distinct."""

    def __init__(self, datasets: Sequence[Dataset], offsets: Sequence[int]) -> None:
        super().__init__(datasets)
        self._offsets = offsets

    def _label(self, which: int, labels: torch.Tensor) -> torch.Tensor:
        return labels + self._offsets[which]
