"""Lightweight experts: extract them from a residual, pack them into small files, switch them in and out of a model."""

from freemerge.experts.files import check_merged_hash, load_expert, save_expert
from freemerge.experts.sparse import SparseExpert, extract
from freemerge.experts.switch import ExpertSwitch, attached, check_fits

__all__ = [
    "ExpertSwitch",
    "SparseExpert",
    "attached",
    "check_fits",
    "check_merged_hash",
    "extract",
    "load_expert",
    "save_expert",
]
