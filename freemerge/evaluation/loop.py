"""The multi-task evaluation loop: one model, every task, one number each."""

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


@torch.no_grad()
def evaluate(
    predict: Predict,
    loaders: Mapping[str, Iterable],
    label_space: LabelSpace,
    device: torch.device | str = "cpu",
    metrics: Mapping[str, TaskMetric | str | Metric] | None = None,
) -> dict[str, float]:
    """Evaluate one metric of a model on every task: accuracy, or the task's own metric.

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

    Raises:
        NotFiniteError: an output is NaN or +∞ on any rank: a score of it would mean nothing.
    """
    rank, world = rank_and_world()
    counting = MultiTaskMetrics(label_space, metrics).to(device)
    bad = torch.zeros(len(loaders), dtype=torch.int, device=device)  # batches with NaN or infinite outputs, by task
    for index, (task, loader) in enumerate(loaders.items()):
        for inputs, labels in islice(loader, rank, None, world):
            labels = labels.to(device) if isinstance(labels, Tensor) else labels
            output = predict(to_device(inputs, device), task)
            bad[index] += _is_no_number(output)
            counting.update(task, output, labels)
    if world > 1:
        dist.all_reduce(bad)
    if wrong := [task for task, count in zip(loaders, bad.tolist(), strict=True) if count]:
        raise NotFiniteError(
            f"outputs for task {', '.join(map(repr, wrong))} are NaN or infinite, so there is no score: look at the "
            "weights (a merge at too large a scale, batch norm's statistics), the inputs and the precision"
        )
    return counting.compute(loaders)


def _is_no_number(output: Any) -> Tensor | bool:
    """Whether an output holds NaN or +∞; −∞ is how a model rules an answer out."""
    values = output.logits if isinstance(output, FreeOutput) else output
    if not isinstance(values, Tensor) or not values.is_floating_point():
        return False
    return (values.isnan() | values.isposinf()).any()
