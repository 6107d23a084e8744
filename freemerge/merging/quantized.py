"""Quantized models: numbers that mean nothing without the scales beside them, so they are refused."""

from __future__ import annotations

import re
from collections.abc import Iterable

from freemerge.checkpoints import Checkpoint

# A quantizer's tensor → the weight that it is beside or instead of: fp8 by blocks and compressed-tensors, LLM.int8(),
# bitsandbytes of 4 bits, GPTQ and AWQ, MXFP4.
_BESIDE = (
    (re.compile(r"(.*\.)weight_scale(_inv)?"), r"\1weight"),
    (re.compile(r"(.*\.)SCB"), r"\1weight"),
    (re.compile(r"(.*\.weight)\.(absmax|quant_map)"), r"\1"),
    (re.compile(r"(.*\.)(qzeros|scales)"), r"\1qweight"),
    (re.compile(r"(.*\.)weight_(shape|scale)"), r"\1weight_packed"),
    (re.compile(r"(.*)_scales"), r"\1_blocks"),
)


def find_quantized(checkpoint: Checkpoint, names: Iterable[str]) -> tuple[str, str] | None:
    """A weight that is quantized and the tensor that shows it; None if there is none.

    Weights stored in fp8 or in integers, without scales, are plain numbers.

    Args:
        checkpoint: a model.
        names: of the tensors to look at; others are left out of the merge.
    """
    for name in names:
        for pattern, beside in _BESIDE:
            if checkpoint.has(name) and (found := pattern.fullmatch(name)):
                weight = found.expand(beside)
                if checkpoint.has(weight) and _is_packed(checkpoint, weight):
                    return weight, name
    return None


def _is_packed(checkpoint: Checkpoint, name: str) -> bool:
    dtype = checkpoint.spec(name).dtype
    return dtype.itemsize == 1 or not dtype.is_floating_point
