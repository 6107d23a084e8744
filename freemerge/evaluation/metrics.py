"""Metrics of several tasks at once, exact on any number of ranks.

A routed model may take a sample for another task's. So that accuracy means the same for every model, classes are
compared in the union of all label spaces: class c of task t is the global class offset(t) + c, and a prediction counts
only if both its task and its class are right. For a model that is told the task this is plain accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from freemerge.models import FreeOutput


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
        label_space: the tasks and their classes.
        metric: the metric to copy for each task; takes (predicted, true) global classes. Accuracy by default.
    """

    def __init__(self, label_space: LabelSpace, metric: Metric | None = None) -> None:
        super().__init__()
        self.label_space = label_space
        template = metric if metric is not None else MulticlassAccuracy(label_space.size, average="micro")
        self.per_task = nn.ModuleDict({task: template.clone() for task in label_space.tasks})

    def update(self, task: str, output: Tensor | FreeOutput, labels: Tensor) -> None:
        """Add a batch of `task`: what the model returned and the true labels (B,)."""
        predicted = self.label_space.predictions(task, output)
        self.per_task[task].update(predicted, self.label_space.to_global(task, labels))

    def compute(self) -> dict[str, float]:
        """Task name → value, over all ranks where there are several. Every rank must call it."""
        return {task: float(metric.compute()) for task, metric in self.per_task.items()}

    def reset(self) -> None:
        """Start over."""
        for metric in self.per_task.values():
            metric.reset()
