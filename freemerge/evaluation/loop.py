"""The multi-task evaluation loop: one model, and one metric for each task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from freemerge.data import TaskMetric
from freemerge.errors import NotFiniteError
from freemerge.evaluation.metrics import LabelSpace, MultiTaskMetrics
from freemerge.inputs import Inputs, to_device
from freemerge.models import FreeOutput
from freemerge.runtime.process_group import rank_and_world

Predict = Callable[[Inputs, str], Any]
"""(inputs, task name) → a model's output."""


@torch.no_grad()
def evaluate(
    predict: Predict,
    loaders: Mapping[str, Iterable],
    label_space: LabelSpace,
    device: torch.device | str = "cpu",
    metrics: Mapping[str, TaskMetric | str | Metric] | None = None,
) -> dict[str, float]:
    """Evaluate a model on every task with one metric per task.

    With several ranks, each rank evaluates every world-th batch. No sample is repeated, so the result is exact for any
    number of samples. All ranks must call this with complete loaders (without a distributed sampler), and all get the
    result.

    Args:
        predict: called with inputs on `device` and a task name; returns logits (B, C) in the task's label space, a
            FreeOutput, or any other output that the task's metric accepts.
        loaders: task name → iterable of (inputs, labels).
        label_space: the tasks and their classes; it can have more tasks than `loaders`.
        device: the device to compute on.
        metrics: task name → metric, for tasks whose metric is not accuracy; see `MultiTaskMetrics`.

    Returns:
        Task name → value of its metric, for the tasks of `loaders`.

    Raises:
        NotFiniteError: if an output is NaN or +∞ on any rank.
    """
    rank, world = rank_and_world()
    totals = MultiTaskMetrics(label_space, metrics).to(device)
    bad = torch.zeros(len(loaders), dtype=torch.int, device=device)  # batches with NaN or infinite outputs, by task
    for index, (task, loader) in enumerate(loaders.items()):
        for inputs, labels in islice(loader, rank, None, world):
            labels = labels.to(device) if isinstance(labels, Tensor) else labels
            output = predict(to_device(inputs, device), task)
            bad[index] += _is_not_finite(output)
            totals.update(task, output, labels)
    if world > 1:
        dist.all_reduce(bad)
    if wrong := [task for task, count in zip(loaders, bad.tolist(), strict=True) if count]:
        raise NotFiniteError(
            f"outputs for task {', '.join(map(repr, wrong))} are NaN or infinite, so there is no score: check the "
            "weights (a merge with too large a scale, batch-norm statistics), the inputs and the precision"
        )
    return totals.compute(loaders)


def _is_not_finite(output: Any) -> Tensor | bool:
    """Whether an output contains NaN or +∞. −∞ is allowed: models use it to exclude a class or token."""
    values = output.logits if isinstance(output, FreeOutput) else output
    if not isinstance(values, Tensor) or not values.is_floating_point():
        return False
    return (values.isnan() | values.isposinf()).any()
