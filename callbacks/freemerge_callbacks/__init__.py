"""Lightning callbacks that merge the models your own Trainer fine-tunes and evaluate the result on every task."""

from freemerge_callbacks._weights import save_base
from freemerge_callbacks.merge_at_fit_end import MergeAtFitEnd
from freemerge_callbacks.merge_preview import MergePreview
from freemerge_callbacks.multi_task_evaluation import MultiTaskEvaluation
from freemerge_callbacks.statistics_at_fit_end import StatisticsAtFitEnd
from freemerge_callbacks.task_checkpoint import TaskCheckpoint

__all__ = ["MergeAtFitEnd", "MergePreview", "MultiTaskEvaluation", "StatisticsAtFitEnd", "TaskCheckpoint", "save_base"]
