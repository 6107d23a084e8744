"""The search for a method's parameters: the search space, and the study that stores trials."""

from freemerge.tuning.space import Parameter, Range, Space, default_ranges
from freemerge.tuning.study import Sampler, Search, Trial, searchers

__all__ = ["Parameter", "Range", "Sampler", "Search", "Space", "Trial", "default_ranges", "searchers"]
