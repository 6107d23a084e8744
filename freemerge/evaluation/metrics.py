"""Metrics of several tasks at once, exact on any number of ranks.

A router can send a sample to another task. Classes are therefore compared in the union of all label spaces, where class
c of task t is the global class offset(t) + c: a prediction is right only if both its task and its class are right. For
a model that is given the task, this is the ordinary accuracy, macro-F1 or Matthews correlation. Predictions that are
not classes (numbers, tokens) are compared directly.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torchmetrics import Metric

from freemerge.data import TaskMetric
from freemerge.models import FreeOutput, TaskModules


class LabelSpace:
    """The union of several tasks' label spaces.

    Args:
        num_classes: task name → number of classes; the order of the tasks determines the global classes.
    """

    def __init__(self, num_classes: Mapping[str, int]) -> None:
        self.num_classes = dict(num_classes)
        self.tasks = tuple(self.num_classes)
        sizes = torch.tensor([0, *self.num_classes.values()])
        self._offsets = sizes.cumsum(0)  # (K + 1,)
        self.size = int(self._offsets[-1])

    def to_global(self, task: str, labels: Tensor) -> Tensor:
        """Convert a task's labels to global classes.

        Args:
            task: the task.
            labels: int64 (B,).

        Returns:
            int64 (B,).
        """
        return labels + int(self._offsets[self.tasks.index(task)])

    def predictions(self, task: str, output: Tensor | FreeOutput) -> Tensor:
        """The global classes that a model predicts for a batch.

        Args:
            task: the task of the batch.
            output: logits (B, C) of this task's head, or a FreeModel's output, which contains the chosen tasks.

        Returns:
            int64 (B,).

        Raises:
            ValueError: if the FreeModel has a task that is not in this label space.
        """
        if isinstance(output, FreeOutput):
            missing = [name for name in output.tasks if name not in self.num_classes]
            if missing:
                raise ValueError(
                    f"the model routes to {', '.join(missing)}, which is not among the tasks {', '.join(self.tasks)}"
                )
            offsets = torch.stack([self._offsets[self.tasks.index(name)] for name in output.tasks])
            return output.labels + offsets.to(output.task.device)[output.task]
        return self.to_global(task, output.argmax(dim=1))


class MultiTaskMetrics(nn.Module):
    """One metric per task.

    Args:
        label_space: the tasks and their classes; 0 classes for tasks that are not classifications.
        metrics: task name → metric: a `TaskMetric`, its text form, or a torchmetrics metric, which gets the model's
            output and the labels (see `aligned`). Tasks without an entry use accuracy.

    Raises:
        ValueError: if there is no such metric or task.
    """

    def __init__(self, label_space: LabelSpace, metrics: Mapping[str, TaskMetric | str | Metric] | None = None) -> None:
        super().__init__()
        self.label_space = label_space
        metrics = dict(metrics or {})
        if unknown := [task for task in metrics if task not in label_space.tasks]:
            raise ValueError(
                f"a metric for '{unknown[0]}', which is not among the tasks: {', '.join(label_space.tasks)}"
            )
        self.named: dict[str, TaskMetric] = {}
        self.per_task: TaskModules[Metric] = TaskModules()
        for task in label_space.tasks:
            metric = metrics.get(task, TaskMetric())
            if isinstance(metric, Metric):
                self.per_task[task] = metric.clone()
                continue
            self.named[task] = metric = TaskMetric.parse(metric) if isinstance(metric, str) else metric
            classes = label_space.size if metric.compares_classes else label_space.num_classes[task]
            self.per_task[task] = metric.build(classes)

    def update(self, task: str, output: Any, labels: Any) -> None:
        """Add a batch of `task`.

        Args:
            task: the task.
            output: the model's output: a FreeOutput, or what the task's metric accepts (see `TaskMetric.read`).
            labels: the true labels.

        Raises:
            ValueError: if the output does not fit the metric.
        """
        metric = self.named.get(task)
        if metric is None:
            self.per_task[task].update(*aligned(output, labels))
        elif metric.compares_classes:
            predicted = self.label_space.predictions(task, output)
            self.per_task[task].update(predicted, self.label_space.to_global(task, labels))
        else:
            if isinstance(output, FreeOutput):
                output = self._own_outputs(task, output, labels)
            self.per_task[task].update(*metric.read(output, labels))

    def _own_outputs(self, task: str, output: FreeOutput, labels: Tensor) -> Tensor:
        """A FreeModel's logits (B, C) in this task's label space, numbers (B, 1), or logits of tokens (B, L, V)."""
        if output.logits.dim() == 3:  # a language model, whose vocabulary is the same for all tasks
            return output.logits
        width = max(self.label_space.num_classes[task], 1)
        logits = output.logits[:, :width].clone()
        if self.named[task].kind == "classification":
            # If another task's head has answered, the true class is ranked last.
            elsewhere = output.task != output.tasks.index(task)
            logits[elsewhere] = -one_hot(labels[elsewhere], width).to(logits.dtype)
        return logits

    def compute(self, tasks: Iterable[str] | None = None) -> dict[str, float]:
        """Compute the metrics over all ranks; every rank must call this.

        Args:
            tasks: the tasks; None for all.

        Returns:
            Task name → value.
        """
        with warnings.catch_warnings():
            # A rank may have had no batch of a small task; the result then comes from the other ranks.
            warnings.filterwarnings("ignore", message=".*compute.* was called before the .*update")
            return {task: float(self.per_task[task].compute()) for task in (tasks or self.per_task)}

    def reset(self) -> None:
        """Reset all metrics to their initial state."""
        for metric in self.per_task.values():
            metric.reset()


def aligned(output: Any, labels: Any) -> tuple[Any, Any]:
    """Bring outputs and labels into shapes that torchmetrics can compare.

    - If one of them has an extra dimension of size 1 after the batch dimension, (B, 1) instead of (B,), it is removed.
    - If the classes of dense outputs are the last dimension, (B, L, C) for labels (B, L), they become dimension 1.

    Args:
        output: a model's output; only tensors are changed.
        labels: the labels.

    Returns:
        (output, labels) in matching shapes, or unchanged.
    """
    if not (isinstance(output, Tensor) and isinstance(labels, Tensor)):
        return output, labels
    if output.ndim == labels.ndim + 1 and output.shape[1] == 1:
        return output[:, 0], labels
    if labels.ndim == output.ndim + 1 and labels.shape[1] == 1:
        return output, labels[:, 0]
    if output.ndim == labels.ndim > 1 and labels.shape[1] == 1 < output.shape[1]:
        return output, labels[:, 0]
    rest = (*output.shape[:1], *output.shape[2:])
    if labels.ndim > 1 and output.shape[:-1] == labels.shape != rest:
        return output.movedim(-1, 1), labels
    return output, labels
