"""LoRA adapters of PEFT, read as what they are: differences to a base, exact and one tensor at a time.

A module's two factors become the difference of its weight, s · B·A in float32, when that tensor (or a piece of it) is
asked for. Factors are never merged with each other: the product of sums is not the sum of products.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from freemerge.checkpoints.checkpoint import Checkpoint, TensorSpec
from freemerge.checkpoints.errors import CheckpointError

_PREFIX = "base_model.model."  # PEFT's two wrappers around the model


class _Factors(NamedTuple):
    """Where the factors of a difference lie: left (m, r) and right (r, n), before transposition."""

    left: str
    right: str
    transposed: bool  # the factors are stored as (r, m) and (n, r)
    scale: float


def open_adapter(folder: Path, label: str, weights: Checkpoint) -> Checkpoint:
    """A checkpoint over a LoRA adapter: `deltas` names the tensors that are differences to the base.

    Tensors that the adapter holds whole (modules_to_save, biases) are given as they are; tensors of the base that it
    does not name are unchanged.

    Args:
        folder: holds `adapter_config.json`.
        label: how messages call this model.
        weights: the opened `adapter_model.safetensors` or `.bin` of this folder.

    Raises:
        CheckpointError: the configuration is broken, or the adapter is of a kind that is no sum W + s·B·A.
    """
    config = _read_config(folder)
    factors: dict[str, _Factors] = {}
    biases: dict[str, tuple[str, float]] = {}
    whole: dict[str, str] = {}
    specs: dict[str, TensorSpec] = {}
    names = dict.fromkeys((*weights.names, *weights.tied))
    for name in names:
        module, kind = _split(name)
        if kind in ("lora_A.weight", "lora_embedding_A"):
            embedding = kind == "lora_embedding_A"
            other = name.removesuffix(kind) + ("lora_embedding_B" if embedding else "lora_B.weight")
            if other not in names:
                raise CheckpointError(f"{folder}: the adapter has '{name}' and no '{other}'; save it again")
            transposed = embedding or bool(config.get("fan_in_fan_out"))
            inner, outer = weights.spec(name).shape, weights.spec(other).shape
            scale = _scale(config, module, rank=inner[0])
            target = f"{module}.weight"
            if transposed:  # ΔW = (B·A)ᵀ = Aᵀ·Bᵀ
                factors[target] = _Factors(name, other, True, scale)
                specs[target] = TensorSpec((inner[1], outer[0]), torch.float32)
            else:
                factors[target] = _Factors(other, name, False, scale)
                specs[target] = TensorSpec((outer[0], *inner[1:]), torch.float32)
        elif kind == "lora_B.bias":
            rank = weights.spec(name.removesuffix("lora_B.bias") + "lora_A.weight").shape[0]
            biases[f"{module}.bias"] = (name, _scale(config, module, rank))
            specs[f"{module}.bias"] = TensorSpec(weights.spec(name).shape, torch.float32)
        elif kind in ("lora_B.weight", "lora_embedding_B"):
            continue
        elif kind is not None:
            raise CheckpointError(
                f"{folder}: holds '{name}', which is no plain LoRA (DoRA?); merge the adapter into its base model with "
                "PEFT first"
            )
        elif ".base_layer." not in name:  # the base's own weight beside its factors
            whole[name.removeprefix(_PREFIX)] = name
            specs[name.removeprefix(_PREFIX)] = weights.spec(name)
    if not factors:
        raise CheckpointError(f"{folder}: the adapter holds no LoRA factors; is it of another kind?")

    def read(name: str, run: tuple[int, int] | None) -> Tensor:
        if name in factors:
            return _product(weights, factors[name], specs[name].shape, run)
        stored, scale = biases[name] if name in biases else (whole[name], 1.0)
        values = weights.tensor(stored) if run is None else weights.run(stored, *run)
        return values.float() * scale if name in biases else values

    deltas = frozenset((*factors, *biases))
    return Checkpoint(label, specs, read, deltas=deltas, partial=True, source=weights)


def _read_config(folder: Path) -> dict:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text())
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not an adapter's configuration ({error}); save it again") from None
    for unsupported, wrong in {
        f"a {kind} adapter": kind != "LORA",
        "a DoRA adapter": config.get("use_dora"),
        "an adapter with target_parameters": config.get("target_parameters"),
        "an adapter with layer_replication": config.get("layer_replication"),
    }.items():
        if wrong:
            raise CheckpointError(
                f"{folder}: is {unsupported}, only plain LoRA is read; merge it into its base model with PEFT first"
            )
    return config


def _split(name: str) -> tuple[str, str | None]:
    """`base_model.model.layer.q.lora_A.weight` → (`layer.q`, `lora_A.weight`); kind None for whole tensors."""
    found = re.fullmatch(r"(.+?)\.(lora_.+)", name.removeprefix(_PREFIX))
    return (found[1], found[2]) if found else (name, None)


def _scale(config: dict, module: str, rank: int) -> float:
    """s = α/r, or α/√r with rsLoRA; α may be set for modules by patterns of the end of their names."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _product(weights: Checkpoint, factors: _Factors, shape: tuple[int, ...], run: tuple[int, int] | None) -> Tensor:
    """s · left @ right, or the values of a run of it in row-major order, computed from no more rows than it has."""
    columns = torch.Size(shape[1:]).numel()
    start, stop = run or (0, shape[0] * columns)
    first, last = start // columns, -(-stop // columns)
    if factors.transposed:
        left = weights.tensor(factors.left).float().T[first:last]
        right = weights.tensor(factors.right).float().T
    else:
        rank = weights.spec(factors.right).shape[0]
        left = weights.run(factors.left, first * rank, last * rank).float().view(last - first, rank)
        right = weights.tensor(factors.right).float().flatten(1)
    product = (left @ right).mul_(factors.scale)
    if run is None:
        return product.reshape(shape)
    return product.reshape(-1)[start - first * columns : stop - first * columns]
