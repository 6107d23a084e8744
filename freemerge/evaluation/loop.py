"""The multi-task evaluation loop: one model, every task, one number each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from freemerge.evaluation.metrics import LabelSpace, MultiTaskMetrics
from freemerge.inputs import Inputs, to_device
from freemerge.models import FreeOutput

Predict = Callable[[Inputs, str], "Tensor | FreeOutput"]


@torch.no_grad()
def evaluate(
    predict: Predict,
    loaders: Mapping[str, Iterable],
    label_space: LabelSpace,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Accuracy of a model on every task.

    Under several ranks each evaluates every world-th batch: no sample is padded in or counted twice, so the result is
    exact for any size. All ranks must call it, with loaders that are not sharded themselves, and all get the result.

    Args:
        predict: (inputs on `device`, task name) → logits (B, C) in the task's label space, or a FreeOutput.
        loaders: task name → iterable of (inputs, labels).
        label_space: the tasks and their classes; may hold more tasks than `loaders`.
        device: where to compute.

    Returns:
        Task name → accuracy in [0, 1], for the tasks of `loaders`.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    metrics = MultiTaskMetrics(label_space).to(device)
    for task, loader in loaders.items():
        for inputs, labels in islice(loader, rank, None, world):
            metrics.update(task, predict(to_device(inputs, device), task), labels.to(device))
    computed = {task: metrics.per_task[task].compute() for task in loaders}
    return {task: float(value) for task, value in computed.items()}
