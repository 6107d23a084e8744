"""Lightweight experts: extract them from a residual, store them in small files, add them to a model and remove them."""

from freemerge.experts.base import Expert, check_fits, class_path, is_registered, kind_of
from freemerge.experts.codec import Encoding, decode_values, encode_values
from freemerge.experts.extraction import STATISTICS, extract, extract_low_rank
from freemerge.experts.files import check_hash, load_expert, save_expert
from freemerge.experts.kinds.low_rank import LowRankExpert, matrix_shape
from freemerge.experts.kinds.masked import MaskedExpert, emr_experts
from freemerge.experts.kinds.sparse import SparseExpert
from freemerge.experts.lora import LoraAdapter, as_lora
from freemerge.experts.mixing import mix, mixable
from freemerge.experts.packed import PackedExpert
from freemerge.experts.running.groups import run_groups
from freemerge.experts.running.layerwise import substituted
from freemerge.experts.running.locks import exclusive
from freemerge.experts.running.mixture import Mixture
from freemerge.experts.running.replicas import drop_replicas, workspace
from freemerge.experts.running.switch import ExpertSwitch, attached, write_into
from freemerge.experts.running.weight_cache import WeightCache
from freemerge.experts.tied import by_first_names, names_of_changes
from freemerge.moved import names_that_moved

__all__ = [
    "STATISTICS",
    "Encoding",
    "Expert",
    "ExpertSwitch",
    "LoraAdapter",
    "LowRankExpert",
    "MaskedExpert",
    "Mixture",
    "PackedExpert",
    "SparseExpert",
    "WeightCache",
    "as_lora",
    "attached",
    "by_first_names",
    "check_fits",
    "check_hash",
    "class_path",
    "decode_values",
    "drop_replicas",
    "emr_experts",
    "encode_values",
    "exclusive",
    "extract",
    "extract_low_rank",
    "is_registered",
    "kind_of",
    "load_expert",
    "matrix_shape",
    "mix",
    "mixable",
    "names_of_changes",
    "run_groups",
    "save_expert",
    "substituted",
    "workspace",
    "write_into",
]


__getattr__ = names_that_moved(__name__)
