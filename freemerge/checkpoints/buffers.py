"""Tensors of a file that are no weights: constants that follow from the configuration, and statistics of data."""

from __future__ import annotations

import re

from freemerge.checkpoints.checkpoint import TensorSpec

# Older versions of transformers saved them, newer ones compute them and ignore them in files.
_CONSTANTS = re.compile(
    r"(?:.*\.)?(?:(?:original_)?inv_freq|cos_cached|sin_cached|freqs_cis|position_ids|token_type_ids|masked_bias"
    r"|relative_position_index|relative_coords_table|causal_mask|embed_positions\._float_tensor)"
)
_MASK = re.compile(r"(?:.*\.)?\w*attn?(?:ention)?\.bias")  # a triangle of ones
_STATISTICS = re.compile(r"(?:.*\.)?(?:running_mean|running_var|num_batches_tracked)")


def is_constant(name: str, spec: TensorSpec) -> bool:
    """Whether a tensor is computed from the configuration, never trained, and no matter if a file has it or not.

    Args:
        name: of the tensor.
        spec: its shape and dtype; the causal mask of GPT-2's attention is called like a bias and is (1, 1, n, n).
    """
    if _CONSTANTS.fullmatch(name):
        return True
    return _MASK.fullmatch(name) is not None and len(spec.shape) == 4 and spec.shape[:2] == (1, 1)


def is_statistic(name: str) -> bool:
    """Whether a tensor is a statistic of the data that a batch norm has seen."""
    return _STATISTICS.fullmatch(name) is not None
