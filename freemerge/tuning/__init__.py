"""The search for a method's parameters: the search space, the study that stores trials, and AdaMerging's learning."""

from freemerge.tuning.entropy import entropy, entropy_gradient, learn_coefficients
from freemerge.tuning.space import Parameter, Range, Space, default_ranges
from freemerge.tuning.study import Sampler, Search, Trial, searchers

__all__ = [
    "Parameter",
    "Range",
    "Sampler",
    "Search",
    "Space",
    "Trial",
    "default_ranges",
    "entropy",
    "entropy_gradient",
    "learn_coefficients",
    "searchers",
]
