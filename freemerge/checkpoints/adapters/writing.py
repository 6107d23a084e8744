"""Write a LoRA adapter as PEFT reads it: `adapter_config.json` and `adapter_model.safetensors`.

What PEFT calls the factors, and which way round they lie, depends on the kind of layer: see `Layer`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from freemerge.checkpoints.adapters.config import CONFIG
from freemerge.checkpoints.adapters.layers import Layer
from freemerge.checkpoints.adapters.parsing import PREFIX
from freemerge.checkpoints.checkpoint import TensorSpec
from freemerge.checkpoints.draft import Draft
from freemerge.checkpoints.folder import check_folder

WEIGHTS = "adapter_model.safetensors"


def pack_factors(name: str, layer: Layer, shape: tuple[int, ...], left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """The factors of one difference as PEFT stores them.

    Args:
        name: of the base's tensor.
        layer: its kind.
        shape: its shape.
        left: (m, r), where ΔW as a matrix (dim 0 × the rest) is left @ right.
        right: (r, n).

    Returns:
        stored name → tensor.
    """
    stem = PREFIX + name.removesuffix("weight")
    if layer is Layer.EMBEDDING:
        return {stem + "lora_embedding_A": left.T, stem + "lora_embedding_B": right.T}
    outer, inner = (right.T, left.T) if layer is Layer.TURNED else (left, right)
    if layer is Layer.CONVOLUTION:
        outer = outer.reshape(*outer.shape, *(1 for _ in shape[2:]))
        inner = inner.reshape(len(inner), *shape[1:])
    return {stem + "lora_A.weight": inner, stem + "lora_B.weight": outer}


def make_config(
    rank: int, targets: Iterable[str], *, base: str, turned: bool, biases: bool, whole: Iterable[str]
) -> dict[str, Any]:
    """The adapter's `adapter_config.json`, with a scale of 1.

    Args:
        rank: of all factors.
        targets: the modules with factors.
        base: name or path of the base.
        turned: whether linear layers hold their weight as (inputs, outputs).
        biases: whether biases of the targets are stored.
        whole: the modules that are stored whole.
    """
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "fan_in_fan_out": turned,
        "bias": "lora_only" if biases else "none",
        # One expression for whole names: in a list PEFT takes each for the end of a name.
        "target_modules": "|".join(re.escape(module) for module in sorted(targets)),
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
        files: the other files, by name.
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
