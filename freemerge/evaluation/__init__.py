"""The multi-task evaluation loop and the report."""

from freemerge.evaluation.evaluator import MultiTaskEvaluator
from freemerge.evaluation.loop import evaluate
from freemerge.evaluation.metrics import LabelSpace, MultiTaskMetrics
from freemerge.evaluation.report import Report, Row, mean_score
from freemerge.evaluation.routing import Routing, evaluate_routing

__all__ = [
    "LabelSpace",
    "MultiTaskEvaluator",
    "MultiTaskMetrics",
    "Report",
    "Routing",
    "Row",
    "evaluate",
    "evaluate_routing",
    "mean_score",
]
