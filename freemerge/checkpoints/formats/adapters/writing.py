"""Write a LoRA adapter as PEFT reads it: `adapter_config.json` and `adapter_model.safetensors`.

PEFT's names and orientation of the factors depend on the kind of layer; see `Layer`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from freemerge.checkpoints.checkpoint import TensorSpec
from freemerge.checkpoints.formats.adapters.config import CONFIG
from freemerge.checkpoints.formats.adapters.layers import Layer
from freemerge.checkpoints.formats.adapters.parsing import PREFIX
from freemerge.checkpoints.writing.draft import Draft
from freemerge.checkpoints.writing.folder import check_folder

WEIGHTS = "adapter_model.safetensors"

_VERSION = "0.19.1"  # the version of PEFT that introduced this layout of stacked experts


def pack_factors(stem: str, layer: Layer, shape: tuple[int, ...], left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """The factors of one difference as PEFT stores them.

    Args:
        stem: prefix of their names, that of the module; see `stems`.
        layer: the kind of the layer.
        shape: shape of the difference.
        left: (m, r), where ΔW as a matrix (dim 0 × the rest) is left @ right; for a stack (E, m, r), where each matrix
            of ΔW is.
        right: (r, n), or (E, r, n).

    Returns:
        stored name → tensor.
    """
    if layer is Layer.EMBEDDING:
        return {stem + "lora_embedding_A": left.T, stem + "lora_embedding_B": right.T}
    if layer in (Layer.TRANSPOSED, Layer.PARAMETER_TRANSPOSED):
        left, right = right.mT, left.mT
    if layer is Layer.CONVOLUTION:
        left = left.reshape(*left.shape, *(1 for _ in shape[2:]))
        right = right.reshape(len(right), *shape[1:])
    if layer.is_parameter and left.dim() == 3:  # B (m, r·E): the experts side by side in each rank; A (E·r, n)
        left, right = left.permute(1, 2, 0).flatten(1), right.flatten(0, 1)
    return {stem + "lora_A.weight": right, stem + "lora_B.weight": left}


def stems(targets: Iterable[tuple[str, Layer]]) -> dict[str, str]:
    """The prefix of the names of each tensor's factors.

    PEFT wraps a module once for each of its parameters that has factors, the first of them innermost.

    Args:
        targets: name and kind of every tensor with factors, those of a module in the model's order.
    """
    found: dict[str, str] = {}
    wrapped: dict[str, list[str]] = {}
    for name, layer in targets:
        module = name.rpartition(".")[0]
        found[name] = f"{PREFIX}{module}."
        if layer.is_parameter:
            wrapped.setdefault(module, []).append(name)
    for names in wrapped.values():
        for depth, name in enumerate(reversed(names)):
            found[name] += "base_layer." * depth
    return found


def make_config(
    rank: int, targets: Iterable[tuple[str, Layer]], *, biases: bool, whole: Iterable[str], origin: Mapping[str, Any]
) -> dict[str, Any]:
    """The adapter's `adapter_config.json`, with a scale of 1.

    Args:
        rank: the rank of all factors.
        targets: name and kind of every tensor with factors.
        biases: whether biases of the targets are stored.
        whole: the modules that are stored whole.
        origin: the reference to the base and its task; see `find_origin`.
    """
    targets = list(targets)
    modules = sorted(name.rpartition(".")[0] for name, layer in targets if not layer.is_parameter)
    parameters = sorted(name for name, layer in targets if layer.is_parameter)
    return {
        "peft_type": "LORA",
        "peft_version": _VERSION,
        **origin,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "fan_in_fan_out": any(layer is Layer.TRANSPOSED for _, layer in targets),
        "bias": "lora_only" if biases else "none",
        # A single expression matches whole names; PEFT matches the entries of a list with the ends of names.
        "target_modules": "|".join(map(re.escape, modules)) if modules else [],
        "target_parameters": parameters or None,
        "modules_to_save": sorted(whole) or None,
    }


def write_adapter_folder(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    files: Mapping[str, bytes],
    overwrite: bool = False,
) -> None:
    """Write the folder of an adapter, atomically.

    Args:
        path: the folder; its parent is created.
        config: see `make_config`.
        tensors: stored name → tensor.
        files: contents of the other files, by name.
        overwrite: replace a folder that freemerge wrote.

    Raises:
        CheckpointError: the folder exists already, or cannot be written.
    """
    check_folder(path, overwrite)
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    draft = Draft(path, {WEIGHTS: specs})
    draft.begin("an adapter")
    try:
        for name, tensor in tensors.items():
            draft.write(name, 0, tensor)
        draft.flush()
        draft.commit({**files, CONFIG: (json.dumps(config, indent=2) + "\n").encode()})
    except BaseException:
        draft.discard()
        raise
