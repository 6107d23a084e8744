"""The merging algorithms, and the engine that merges task vectors into one model."""

from freemerge.errors import MergeError, MergeWarning
from freemerge.merging.advice.advise import Advice, advise
from freemerge.merging.advice.relations import Relations
from freemerge.merging.algebra import apply_task_vector, merge_task_vectors, task_vector
from freemerge.merging.api import merge, merge_to, plan_merge
from freemerge.merging.engine.combiner import Combiner
from freemerge.merging.engine.estimate import Estimate
from freemerge.merging.engine.job import parse_dtype
from freemerge.merging.engine.plan import Plan, make_plan
from freemerge.merging.engine.reader import Reader
from freemerge.merging.engine.record import describe_method, make_record
from freemerge.merging.engine.search import Candidates
from freemerge.merging.matching.misfits import is_head
from freemerge.merging.measuring.gram_matrices import GramMatrices, measurable_layers
from freemerge.merging.measuring.squared_gradients import SquaredGradients, draw_log_probability
from freemerge.merging.methods.ace import ACEMerging
from freemerge.merging.methods.ada_merging import AdaMerging
from freemerge.merging.methods.angles import AngleMethod
from freemerge.merging.methods.arcee_fusion import ArceeFusion
from freemerge.merging.methods.balanced import BalancedMerging
from freemerge.merging.methods.base import MergeMethod
from freemerge.merging.methods.breadcrumbs import Breadcrumbs
from freemerge.merging.methods.consensus import Consensus
from freemerge.merging.methods.core_space import CoreSpace
from freemerge.merging.methods.dare import Dare
from freemerge.merging.methods.della import Della
from freemerge.merging.methods.emr import EMRMerging, emr_task_vector
from freemerge.merging.methods.filters import Butterworth, Filter, Gaussian, HighPass, NyquistDisc
from freemerge.merging.methods.fisher import FisherMerging
from freemerge.merging.methods.fr import FRMerging
from freemerge.merging.methods.iso_c import IsoC
from freemerge.merging.methods.iso_cts import IsoCTS
from freemerge.merging.methods.karcher import KarcherMean
from freemerge.merging.methods.knots import KnOTS
from freemerge.merging.methods.localize_and_stitch import LocalizeAndStitch
from freemerge.merging.methods.matrices import MatrixMethod
from freemerge.merging.methods.measured import MeasuredMethod, Statistics, collected
from freemerge.merging.methods.model_stock import ModelStock
from freemerge.merging.methods.multi_slerp import MultiSlerp
from freemerge.merging.methods.nearswap import NearSwap
from freemerge.merging.methods.over_layers import OverLayers
from freemerge.merging.methods.parameters import get_field, replace_fields
from freemerge.merging.methods.pcb import PCBMerging
from freemerge.merging.methods.per_pattern import PerPattern
from freemerge.merging.methods.reg_mean import RegMean
from freemerge.merging.methods.scales import has_scale, rescaled
from freemerge.merging.methods.sce import SCE
from freemerge.merging.methods.slerp import Slerp
from freemerge.merging.methods.svc import SVC
from freemerge.merging.methods.task_arithmetic import TaskArithmetic
from freemerge.merging.methods.ties import Ties
from freemerge.merging.methods.tsv import TSVMerge
from freemerge.merging.methods.weight_average import WeightAverage
from freemerge.merging.methods.weight_slerp import WeightSlerp
from freemerge.merging.methods.whole_weights import WholeWeights
from freemerge.merging.methods.wrapper import MethodWrapper
from freemerge.merging.methods.wudi import WUDIMerging
from freemerge.merging.task_vectors import Vectors
from freemerge.tensors.order_statistics import order_statistics

__all__ = [
    "SCE",
    "SVC",
    "ACEMerging",
    "AdaMerging",
    "Advice",
    "AngleMethod",
    "ArceeFusion",
    "BalancedMerging",
    "Breadcrumbs",
    "Butterworth",
    "Candidates",
    "Combiner",
    "Consensus",
    "CoreSpace",
    "Dare",
    "Della",
    "EMRMerging",
    "Estimate",
    "FRMerging",
    "Filter",
    "FisherMerging",
    "Gaussian",
    "GramMatrices",
    "HighPass",
    "IsoC",
    "IsoCTS",
    "KarcherMean",
    "KnOTS",
    "LocalizeAndStitch",
    "MatrixMethod",
    "MeasuredMethod",
    "MergeError",
    "MergeMethod",
    "MergeWarning",
    "MethodWrapper",
    "ModelStock",
    "MultiSlerp",
    "NearSwap",
    "NyquistDisc",
    "OverLayers",
    "PCBMerging",
    "PerPattern",
    "Plan",
    "Reader",
    "RegMean",
    "Relations",
    "Slerp",
    "SquaredGradients",
    "Statistics",
    "TSVMerge",
    "TaskArithmetic",
    "Ties",
    "Vectors",
    "WUDIMerging",
    "WeightAverage",
    "WeightSlerp",
    "WholeWeights",
    "advise",
    "apply_task_vector",
    "collected",
    "describe_method",
    "draw_log_probability",
    "emr_task_vector",
    "get_field",
    "has_scale",
    "is_head",
    "make_plan",
    "make_record",
    "measurable_layers",
    "merge",
    "merge_task_vectors",
    "merge_to",
    "order_statistics",
    "parse_dtype",
    "plan_merge",
    "replace_fields",
    "rescaled",
    "task_vector",
]
