"""Several classification tasks as one: what a small backbone may be pretrained on."""

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
    """The training and validation samples of several classification tasks; a class is a class of one of them.

    No test sample of theirs is in it: what takes the place of its own test set are the validation samples.

    Args:
        sources: task name → where its data come from; the sizes of this source itself are not used.
    """

    sources: dict[str, TaskSource] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            raise ValueError("PooledSource: give at least one source")

    def prepare(self) -> None:
        for source in self.sources.values():
            source.prepare()

    def identity(self) -> dict[str, Any]:
        return {
            "class": describe(type(self)),
            "sources": {key: source.identity() for key, source in self.sources.items()},
        }

    def build(self, name: str, seed: int) -> Task:
        tasks = [source.build(task, seed) for task, source in self.sources.items()]
        for task in tasks:
            if task.kind != "classification":
                raise ValueError(f"{name}: only classifications can be pooled, and {task.name!r} is a {task.kind}")
        classes = [f"{task.name}/{label}" for task in tasks for label in task.class_names]
        firsts = [0, *accumulate(task.num_classes for task in tasks)][:-1]
        train, val = (_Pooled([getattr(task, split) for task in tasks], firsts) for split in ("train", "val"))
        return Task(name, tuple(classes), train, val, val)


class _Pooled(JoinedDataset):
    """Datasets laid end to end, whose classes follow each other likewise."""

    def __init__(self, datasets: Sequence[Dataset], firsts: Sequence[int]) -> None:
        super().__init__(datasets)
        self._firsts = firsts

    def _label(self, which: int, labels: torch.Tensor) -> torch.Tensor:
        return labels + self._firsts[which]
