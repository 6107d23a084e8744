"""What each task is judged by: names of metrics, metrics of torchmetrics, and what a suite says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torchmetrics import Metric

from freemerge.data import TaskSuite

if TYPE_CHECKING:  # slow to import, and wanted when the first fit begins
    from freemerge.evaluation import TaskMetric

MEAN_IOU = "mean_iou"
"""The metric of dense predictions: logits (B, C, …) and classes (B, …)."""


def open_metrics(
    given: Mapping[str, str | Metric] | None, tasks: Iterable[str], suite: Any, who: str
) -> dict[str, TaskMetric | Metric | str]:
    """Task → metric: what is given, else what a suite says, else accuracy. MEAN_IOU stays a name: its number of classes
    is not known yet.

    Raises:
        ValueError: there is no such task or metric.
    """
    from freemerge.evaluation import TaskMetric

    given = dict(given or {})
    if unknown := [task for task in given if task not in tasks]:
        raise ValueError(f"{who}: a metric for '{unknown[0]}', a task without a loader")
    metrics: dict[str, TaskMetric | Metric | str] = dict.fromkeys(tasks, TaskMetric())
    if isinstance(suite, TaskSuite):
        metrics |= {name: TaskMetric.of(suite.task(name)) for name in suite.names}
    for task, metric in given.items():
        if not isinstance(metric, (str, Metric, TaskMetric)):
            raise ValueError(
                f"{who}: the metric of '{task}' is a {type(metric).__name__}; give the name of a metric, or one metric "
                "of torchmetrics"
            )
        metrics[task] = TaskMetric.parse(metric) if isinstance(metric, str) and metric != MEAN_IOU else metric
    return metrics


def mean_iou(output: Any, who: str, task: str) -> Metric:
    """The mean over the classes of intersection ÷ union, for logits of as many classes as an output has.

    Raises:
        ValueError: the output is no dense prediction.
    """
    from torchmetrics import JaccardIndex

    if not isinstance(output, Tensor) or output.ndim < 3:
        raise ValueError(f"{who}: mean_iou needs logits (B, C, …) for '{task}', got {shape_of(output)}")
    classes = output.shape[1]
    metric = JaccardIndex("binary") if classes == 1 else JaccardIndex("multiclass", num_classes=classes)
    metric.label = MEAN_IOU
    return metric


def check_value(metric: Metric, who: str, task: str) -> None:
    """Require that a metric that has seen one batch gives one number.

    Raises:
        ValueError: it gives something else.
    """
    try:
        value = metric.compute()
    except Exception:  # one batch may be too few for it
        return
    finally:
        metric.reset()
    if (isinstance(value, Tensor) and value.numel() != 1) or isinstance(value, (Mapping, tuple, list)):
        raise ValueError(
            f"{who}: {type(metric).__name__}, the metric of '{task}', gives {shape_of(value)}, and one number is needed"
        )


def label_of(metric: Any) -> str:
    """What a metric is called where it is logged."""
    return getattr(metric, "label", type(metric).__name__)


def shape_of(value: Any) -> str:
    """What a value is, for messages."""
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
