"""The multi-task evaluation loop and the report."""

from freemerge.data.task_metrics import ExactMatch, TaskMetric, metric_for
from freemerge.evaluation.evaluator import MultiTaskEvaluator
from freemerge.evaluation.loop import evaluate
from freemerge.evaluation.metrics import LabelSpace, MultiTaskMetrics
from freemerge.evaluation.report import Report, Row, mean_score
from freemerge.evaluation.routing import Routing, evaluate_routing

__all__ = [
    "ExactMatch",
    "LabelSpace",
    "MultiTaskEvaluator",
    "MultiTaskMetrics",
    "Report",
    "Routing",
    "Row",
    "TaskMetric",
    "evaluate",
    "evaluate_routing",
    "mean_score",
    "metric_for",
]
