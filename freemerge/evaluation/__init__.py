"""The multi-task evaluation loop and the report."""

from freemerge.data import ExactMatch, TaskMetric, metric_for
from freemerge.evaluation.evaluator import MultiTaskEvaluator
from freemerge.evaluation.loop import Predict, evaluate
from freemerge.evaluation.metrics import LabelSpace, MultiTaskMetrics
from freemerge.evaluation.predictions import write_predictions
from freemerge.evaluation.report import Report, Row, comparable, mean_score
from freemerge.evaluation.routing import Routing, evaluate_routing

__all__ = [
    "ExactMatch",
    "LabelSpace",
    "MultiTaskEvaluator",
    "MultiTaskMetrics",
    "Predict",
    "Report",
    "Routing",
    "Row",
    "TaskMetric",
    "comparable",
    "evaluate",
    "evaluate_routing",
    "mean_score",
    "metric_for",
    "write_predictions",
]
