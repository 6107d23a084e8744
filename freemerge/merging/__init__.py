"""The merging algorithms and the engine that runs them: task vectors in, one merged model out."""

from freemerge.errors import MergeError, MergeWarning
from freemerge.merging.api import merge
from freemerge.merging.engine.estimate import Estimate
from freemerge.merging.methods.ace import ACEMerging
from freemerge.merging.methods.base import MergeMethod
from freemerge.merging.methods.breadcrumbs import Breadcrumbs
from freemerge.merging.methods.dare import Dare
from freemerge.merging.methods.emr import EMRMerging, emr_task_vector
from freemerge.merging.methods.filters import Butterworth, Filter, Gaussian, HighPass, NyquistDisc
from freemerge.merging.methods.fr import FRMerging
from freemerge.merging.methods.iso_c import IsoC
from freemerge.merging.methods.iso_cts import IsoCTS
from freemerge.merging.methods.matrices import MatrixMethod
from freemerge.merging.methods.pcb import PCBMerging
from freemerge.merging.methods.per_pattern import PerPattern
from freemerge.merging.methods.task_arithmetic import TaskArithmetic
from freemerge.merging.methods.ties import Ties
from freemerge.merging.methods.tsv import TSVMerge
from freemerge.merging.methods.weight_average import WeightAverage
from freemerge.merging.methods.wudi import WUDIMerging
from freemerge.merging.task_vectors import Vectors, apply_task_vector, merge_task_vectors, task_vector
from freemerge.tensors.order_statistics import order_statistics

__all__ = [
    "ACEMerging",
    "Breadcrumbs",
    "Butterworth",
    "Dare",
    "EMRMerging",
    "Estimate",
    "FRMerging",
    "Filter",
    "Gaussian",
    "HighPass",
    "IsoC",
    "IsoCTS",
    "MatrixMethod",
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
    "WUDIMerging",
    "WeightAverage",
    "apply_task_vector",
    "emr_task_vector",
    "merge",
    "merge_task_vectors",
    "order_statistics",
    "task_vector",
]
