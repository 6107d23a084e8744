"""Tensors of a file that are not weights: constants computed from the configuration, and statistics of data."""

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
    """Whether a tensor is a constant of the configuration: never trained, and optional in files.

    Args:
        name: name of the tensor.
        spec: its shape and dtype; they distinguish GPT-2's causal mask, (1, 1, n, n), from a bias of the same name.
    """
    if _CONSTANTS.fullmatch(name):
        return True
    return _MASK.fullmatch(name) is not None and len(spec.shape) == 4 and spec.shape[:2] == (1, 1)


def is_statistic(name: str) -> bool:
    """Whether a tensor is a running statistic of a batch norm."""
    return _STATISTICS.fullmatch(name) is not None
