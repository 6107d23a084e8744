"""Metrics of several tasks at once, exact on any number of ranks.

A routed model may take a sample for another task's. So that accuracy means the same for every model, classes are
compared in the union of all label spaces: class c of task t is the global class offset(t) + c, and a prediction counts
only if both its task and its class are right. For a model that is told the task this is plain accuracy, macro-F1 or
Matthews correlation. What is no class (a number, tokens) is compared as it is.
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
        num_classes: task name → number of classes; the order counts.
    """

    def __init__(self, num_classes: Mapping[str, int]) -> None:
        self.num_classes = dict(num_classes)
        self.tasks = tuple(self.num_classes)
        sizes = torch.tensor([0, *self.num_classes.values()])
        self._offsets = sizes.cumsum(0)  # (K + 1,)
        self.size = int(self._offsets[-1])

    def to_global(self, task: str, labels: Tensor) -> Tensor:
        """Labels (B,) of one task → global classes (B,)."""
        return labels + int(self._offsets[self.tasks.index(task)])

    def predictions(self, task: str, output: Tensor | FreeOutput) -> Tensor:
        """A model's output for a batch of `task` → the global classes (B,) it predicts.

        Args:
            task: the task the batch comes from, whose label space plain logits are in.
            output: logits (B, C) of that task's head, or what a FreeModel returned, whose routed tasks count.

        Raises:
            ValueError: if a FreeModel's tasks are not these.
        """
        if isinstance(output, FreeOutput):
            missing = [name for name in output.tasks if name not in self.num_classes]
            if missing:
                raise ValueError(
                    f"the model routes to {', '.join(missing)}, not among the tasks: {', '.join(self.tasks)}"
                )
            offsets = torch.stack([self._offsets[self.tasks.index(name)] for name in output.tasks])
            return output.labels + offsets.to(output.task.device)[output.task]
        return self.to_global(task, output.argmax(dim=1))


class MultiTaskMetrics(nn.Module):
    """A metric per task, kept apart.

    Args:
        label_space: the tasks and their classes; 0 classes for tasks that have none.
        metrics: task name → its metric (`TaskMetric`, or how it is written); accuracy for those not named. Or a metric
            of torchmetrics, which is given the model's output and the labels; see `aligned`.

    Raises:
        ValueError: there is no such metric or task.
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
            output: what the model returned: a FreeOutput, or what the task's metric reads (`task_metrics`).
            labels: the true labels of this kind of task.

        Raises:
            ValueError: the output does not fit the metric.
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
        """A FreeModel's logits (B, C) in this task's label space, its numbers (B, 1) or its tokens (B, L, V)."""
        if output.logits.dim() == 3:  # of a language model, whose tokens are the same for all tasks
            return output.logits
        width = max(self.label_space.num_classes[task], 1)
        logits = output.logits[:, :width].clone()
        if self.named[task].kind == "classification":
            # Where another task's head has answered, the true class is not among the answers: it comes last.
            elsewhere = output.task != output.tasks.index(task)
            logits[elsewhere] = -one_hot(labels[elsewhere], width).to(logits.dtype)
        return logits

    def compute(self, tasks: Iterable[str] | None = None) -> dict[str, float]:
        """Task name → value, over all ranks where there are several. Every rank must call it.

        Args:
            tasks: which; None for all.
        """
        with warnings.catch_warnings():
            # A rank may have had no batch of a small task; the others' count for it.
            warnings.filterwarnings("ignore", message=".*compute.* was called before the .*update")
            return {task: float(self.per_task[task].compute()) for task in (tasks or self.per_task)}

    def reset(self) -> None:
        """Start over."""
        for metric in self.per_task.values():
            metric.reset()


def aligned(output: Any, labels: Any) -> tuple[Any, Any]:
    """Outputs and labels in the shapes that torchmetrics compares, where they are tensors whose shapes differ.

    - One of them has a dimension of size 1 after the batch's that the other has not, (B, 1) for (B,): it is left out.
    - The classes of dense outputs are last, (B, L, C) for labels (B, L): they become dimension 1.
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
