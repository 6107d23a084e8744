"""The merging algorithms and the engine that runs them: task vectors in, one merged model out."""

from freemerge.merging.breadcrumbs import Breadcrumbs
from freemerge.merging.dare import Dare
from freemerge.merging.emr_merging import EMRMerging, emr_task_vector
from freemerge.merging.engine import merge
from freemerge.merging.errors import MergeError, MergeWarning
from freemerge.merging.filters import Butterworth, Filter, Gaussian, HighPass, NyquistDisc
from freemerge.merging.forecast import Forecast
from freemerge.merging.fr_merging import FRMerging
from freemerge.merging.iso_c import IsoC
from freemerge.merging.method import MergeMethod
from freemerge.merging.pcb_merging import PCBMerging
from freemerge.merging.per_pattern import PerPattern
from freemerge.merging.ranks import order_statistics
from freemerge.merging.task_arithmetic import TaskArithmetic
from freemerge.merging.ties import Ties
from freemerge.merging.tsv_merge import TSVMerge
from freemerge.merging.vectors import Vectors, apply_task_vector, merge_task_vectors, task_vector
from freemerge.merging.weight_average import WeightAverage

__all__ = [
    "Breadcrumbs",
    "Butterworth",
    "Dare",
    "EMRMerging",
    "FRMerging",
    "Filter",
    "Forecast",
    "Gaussian",
    "HighPass",
    "IsoC",
    "MergeError",
    "MergeMethod",
    "MergeWarning",
    "NyquistDisc",
    "PCBMerging",
    "PerPattern",
    "TSVMerge",
    "TaskArithmetic",
    "Ties",
    "Vectors",
    "WeightAverage",
    "apply_task_vector",
    "emr_task_vector",
    "merge",
    "merge_task_vectors",
    "order_statistics",
    "task_vector",
]
