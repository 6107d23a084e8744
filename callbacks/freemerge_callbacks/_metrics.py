"""The metric of each task: given by name, given as a torchmetrics object, or defined by a suite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torchmetrics import Metric

from freemerge.data import TaskSuite

if TYPE_CHECKING:  # slow to import, and not needed before the first fit
    from freemerge.evaluation import TaskMetric

MEAN_IOU = "mean_iou"
"""The metric of dense predictions: logits (B, C, …) and classes (B, …)."""


def open_metrics(
    given: Mapping[str, str | Metric] | None, tasks: Iterable[str], suite: Any, who: str
) -> dict[str, TaskMetric | Metric | str]:
    """The metric of each task.

    MEAN_IOU stays a name, because the number of classes is not known yet.

    Args:
        given: task → metric, as passed to the callback.
        tasks: the tasks' names.
        suite: the suite that the loaders come from, or anything else.
        who: name of the callback, for error messages.

    Returns:
        Task → the given metric, or else the suite's, or else accuracy.

    Raises:
        ValueError: if a task or a metric is unknown.
    """
    from freemerge.evaluation import TaskMetric

    given = dict(given or {})
    if unknown := [task for task in given if task not in tasks]:
        raise ValueError(f"{who}: `metrics` names '{unknown[0]}', a task without a loader")
    metrics: dict[str, TaskMetric | Metric | str] = dict.fromkeys(tasks, TaskMetric())
    if isinstance(suite, TaskSuite):
        metrics |= {name: TaskMetric.of(suite.task(name)) for name in suite.names}
    for task, metric in given.items():
        if not isinstance(metric, (str, Metric, TaskMetric)):
            raise ValueError(
                f"{who}: the metric of '{task}' is a {type(metric).__name__}; pass the name of a metric, or one "
                "torchmetrics metric"
            )
        metrics[task] = TaskMetric.parse(metric) if isinstance(metric, str) and metric != MEAN_IOU else metric
    return metrics


def mean_iou(output: Any, who: str, task: str) -> Metric:
    """Make the metric mean intersection over union, with as many classes as the output has.

    Args:
        output: logits (B, C, …).
        who: name of the callback, for error messages.
        task: the task's name, for messages.

    Returns:
        torchmetrics' JaccardIndex.

    Raises:
        ValueError: if the output is not a dense prediction.
    """
    from torchmetrics import JaccardIndex

    if not isinstance(output, Tensor) or output.ndim < 3:
        raise ValueError(f"{who}: mean_iou needs logits (B, C, …) for '{task}', got {shape_of(output)}")
    classes = output.shape[1]
    metric = JaccardIndex("binary") if classes == 1 else JaccardIndex("multiclass", num_classes=classes)
    metric.label = MEAN_IOU
    return metric


def check_value(metric: Metric, who: str, task: str) -> None:
    """Check that a metric, updated with one batch, computes one number; then reset it.

    Args:
        metric: the metric.
        who: name of the callback, for error messages.
        task: the task's name, for messages.

    Raises:
        ValueError: if it computes something else.
    """
    try:
        value = metric.compute()
    except Exception:  # one batch may be too little data
        return
    finally:
        metric.reset()
    if (isinstance(value, Tensor) and value.numel() != 1) or isinstance(value, (Mapping, tuple, list)):
        raise ValueError(
            f"{who}: {type(metric).__name__}, the metric of '{task}', must give one number, got {shape_of(value)}"
        )


def label_of(metric: Any) -> str:
    """The name under which a metric is logged.

    Args:
        metric: a TaskMetric or a torchmetrics metric.

    Returns:
        Its `label`, or else its class name.
    """
    return getattr(metric, "label", type(metric).__name__)


def shape_of(value: Any) -> str:
    """Describe a value for messages.

    Args:
        value: any object.

    Returns:
        The shape of a tensor, or else the type.
    """
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
