"""Quantized models: their values are meaningless without separate scales, so they are refused.

- By their configuration, whatever the quantization method: none is supported. - By the layout of their tensors, for
  files without a configuration: codes, which are integers or one-byte values, with scales, zero points or codebooks
  beside them; or integers with the name of weights.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch

from freemerge.checkpoints import Checkpoint
from freemerge.checkpoints.json_files import find_object
from freemerge.errors import MergeError

_ENTRIES = ("quantization_config", "compression_config", "quantization")  # the last one is MLX's
_BESIDE = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json")
_INNER = re.compile(r".*_config")

# Words in the names of tensors that codes need: `weight_scale_inv`, `SCB`, `qzeros`, `weight.absmax`,
# `centroids.weight`.
_SCALES = {"scale", "scales", "scb", "absmax", "zero", "zeros", "qzeros", "zp", "codebook", "codebooks", "centroids"}
_SCALES |= {"tables", "biases", "qmap", "quant"}
_OTHER_SCALES = re.compile(r"(.*\.)?(logit_scale|.*layer_?scale.*)")  # words that every model may have
# Names of integer tensors that every model may have: positions, indices, masks, counters.
_BUFFER = re.compile(r"(.*_)?(ids?|index|indexes|mask|masks|buckets?|bias|tracked|step|steps|count|counts)")
_WEIGHTS = re.compile(r".*weights?|W_q|codes|.*(packed|qdata|blocks)|B|Qidxs|trellis")


def check_quantized(checkpoint: Checkpoint, selected: Collection[str]) -> None:
    """Refuse a quantized model.

    Weights stored in fp8 without scales are accepted as plain numbers.

    Args:
        checkpoint: a model.
        selected: the tensors to check; others are left out of the merge.

    Raises:
        MergeError: it is quantized, or its configuration says so.
    """
    codes = [name for name in checkpoint.names if _is_code(checkpoint, name)]
    for code, scales in _pair(checkpoint, codes):
        if code in selected or scales in selected:
            scaled = f", its scales are in '{scales}'" if scales else f": it holds {_kind(checkpoint, code)}"
            raise MergeError(
                f"{checkpoint.label}: the tensor '{code}' is quantized{scaled}; dequantize the model first (load it "
                "with transformers in bfloat16 and save it)"
            )
    # An adapter's folder may contain the configuration of the quantized model that it was trained on.
    if checkpoint.folder is not None and not checkpoint.partial and (found := _find_entry(checkpoint.folder)):
        file, method = found
        what = (
            f"though all its tensors are plain numbers: if it was dequantized, remove that from {file.name}"
            if not codes
            else f"and '{codes[0]}' holds {_kind(checkpoint, codes[0])}: dequantize the model first (load it with "
            "transformers in bfloat16 and save it)"
        )
        raise MergeError(f"{checkpoint.label}: {file.name} says that the model is quantized ({method}), {what}")


def _find_entry(folder: Path) -> tuple[Path, str] | None:
    """The file that declares a model as quantized, and the method; None if there is none."""
    config = find_object(folder / "config.json") or {}
    inner = [value for key, value in config.items() if _INNER.fullmatch(key) and isinstance(value, dict)]
    for table in (config, *inner):
        for entry in _ENTRIES:
            if table.get(entry):
                return folder / "config.json", _method(table[entry]) or entry
    for name in _BESIDE:
        if settings := find_object(folder / name):
            return folder / name, _method(settings) or "without the name of a method"
    return None


def _method(entry: Any) -> str | None:
    """The method that a quantization configuration names."""
    if not isinstance(entry, dict):
        return None
    named = (entry.get(key) for key in ("quant_method", "quant_algo", "quant_type", "format", "mode"))
    return next((str(name) for name in named if isinstance(name, str)), None)


def _is_code(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor may hold codes: one byte per value, or integers in two dimensions that are not a buffer."""
    shape, dtype = checkpoint.spec(name)
    if dtype.is_floating_point:
        return dtype.itemsize == 1
    return dtype != torch.bool and len(shape) > 1 and not _BUFFER.fullmatch(name.rpartition(".")[2])


def _pair(checkpoint: Checkpoint, codes: Iterable[str]) -> Iterable[tuple[str, str | None]]:
    """Code tensors, each with the tensor that they need; None for integers with the name of weights."""
    if not codes:
        return
    scales: dict[str, list[str]] = defaultdict(list)  # module → names of possible scales
    for name in (*checkpoint.names, *checkpoint.tied):
        if _SCALES.intersection(re.split(r"[._]", name.lower())) and not _OTHER_SCALES.fullmatch(name):
            module = name.rpartition(".")[0]
            scales[module].append(name)
            scales[module.rpartition(".")[0]].append(name)  # `centroids.weight`, `weight.absmax`
    for code in codes:
        module, _, last = code.rpartition(".")
        dtype = checkpoint.spec(code).dtype
        for name in scales.get(module, ()):
            # In a model that was cast to fp8 as a whole, scale parameters are fp8 too.
            if name != code and not (dtype.is_floating_point and checkpoint.spec(name).dtype == dtype):
                yield code, name
                break
        else:
            if not dtype.is_floating_point and _WEIGHTS.fullmatch(last):
                yield code, None


def _kind(checkpoint: Checkpoint, name: str) -> str:
    return f"{str(checkpoint.spec(name).dtype).removeprefix('torch.')} values"
