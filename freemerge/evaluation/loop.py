"""The multi-task evaluation loop: one model, every task, one number each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from freemerge.data import TaskMetric
from freemerge.evaluation.metrics import LabelSpace, MultiTaskMetrics
from freemerge.inputs import Inputs, to_device
from freemerge.runtime.process_group import rank_and_world

Predict = Callable[[Inputs, str], Any]


@torch.no_grad()
def evaluate(
    predict: Predict,
    loaders: Mapping[str, Iterable],
    label_space: LabelSpace,
    device: torch.device | str = "cpu",
    metrics: Mapping[str, TaskMetric | str | Metric] | None = None,
) -> dict[str, float]:
    """One number of a model on every task: its accuracy, or what else the task is judged by.

    Under several ranks each evaluates every world-th batch: no sample is padded in or counted twice, so the result is
    exact for any size. All ranks must call it, with loaders that are not sharded themselves, and all get the result.

    Args:
        predict: (inputs on `device`, task name) → logits (B, C) in the task's label space, a FreeOutput, or what else
            the task's metric reads.
        loaders: task name → iterable of (inputs, labels).
        label_space: the tasks and their classes; may hold more tasks than `loaders`.
        device: where to compute.
        metrics: task name → its metric, where that is not accuracy; see `MultiTaskMetrics`.

    Returns:
        Task name → value of its metric, for the tasks of `loaders`.
    """
    rank, world = rank_and_world()
    counting = MultiTaskMetrics(label_space, metrics).to(device)
    for task, loader in loaders.items():
        for inputs, labels in islice(loader, rank, None, world):
            labels = labels.to(device) if isinstance(labels, Tensor) else labels
            counting.update(task, predict(to_device(inputs, device), task), labels)
    return counting.compute(loaders)
