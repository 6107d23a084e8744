"""A merged model as a LoRA adapter of its base: the merged difference of each matrix, cut to a rank.

- Matrices, embeddings and convolutions get two factors each, from a truncated singular value decomposition.
- Biases of those layers, and other small tensors (norms), are stored whole: the first as PEFT's `bias`, the others as
  its `modules_to_save`. What neither can hold is an error that names the tensor.
- The error of the cut, in the Frobenius norm and relative to the difference, is measured after rounding to the stored
  dtype. It is zero up to rounding if the inputs are adapters whose ranks together are no more than the output's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from freemerge.checkpoints import Checkpoint
from freemerge.checkpoints.adapters.layers import Layer, find_layer
from freemerge.checkpoints.adapters.parsing import PREFIX
from freemerge.checkpoints.adapters.writing import make_config, pack_factors, write_adapter_folder
from freemerge.checkpoints.vocabulary import ties_embeddings
from freemerge.merging.errors import MergeError
from freemerge.merging.low_rank import factorize, squared_error
from freemerge.merging.provenance import make_adapter_card
from freemerge.merging.rounding import round_to
from freemerge.merging.vectors import working_dtype
from freemerge.merging.vocabulary import is_embedding


class Part(NamedTuple):
    """What an adapter holds of one tensor's difference: two factors of it, or the whole."""

    layer: Layer | None  # the kind of layer whose factors these are
    values: tuple[Tensor, ...]  # (n, r) and (r, m), or (*shape)
    lost: float  # the square of what the cut loses, in the Frobenius norm
    square: float  # that of the whole difference


class Truncation(NamedTuple):
    """What a cut to a rank loses, relative to the whole difference, in the Frobenius norm."""

    overall: float
    tensors: dict[str, float]


def cut(path: Path, base: Checkpoint, name: str, delta: Tensor, rank: int, dtype: torch.dtype | None) -> Part | None:
    """Cut the merged difference of one tensor to a rank; None if there is none.

    Args:
        path: the folder to write, for messages.
        base: the pretrained model.
        name: of the tensor.
        delta: its merged difference, float32.
        rank: of the factors, at least 1; zeros fill those of matrices that are smaller, so that one rank holds for all.
        dtype: of the factors; None for float32.

    Raises:
        MergeError: an adapter cannot hold it, or it has values that are no numbers.
    """
    square = float(delta.square().sum(dtype=torch.float64))
    if square == 0:
        return None
    if not math.isfinite(square):
        raise MergeError(f"{path}: the merged difference of the tensor '{name}' has values that are NaN or infinite")
    layer = find_layer(base, name)
    if layer is None:
        if delta.dim() > 1 and not name.endswith(".weight"):  # experts in one tensor, say: too much to keep whole
            raise MergeError(_cannot_hold(path, name))
        return Part(None, (delta.to("cpu", copy=True),), 0.0, square)
    if name in base.tied.values() or (is_embedding(name) and ties_embeddings(base.folder, base.names)):
        raise MergeError(
            f"{path}: the tensor '{name}' is input and output embedding at once, and PEFT would add its difference "
            f"twice when it merges the adapter; write output_format='model', or keep the base's: exclude=['{name}']"
        )
    matrix = delta.flatten(1)
    left, right = (round_to(factor.cpu(), dtype or torch.float32, name) for factor in factorize(matrix, rank))
    lost = squared_error(matrix.cpu(), left, right)
    missing = rank - right.shape[0]
    return Part(layer, (pad(left, (0, missing)), pad(right, (0, 0, 0, missing))), lost, square)


def write_adapter(
    path: Path,
    base: Checkpoint,
    parts: Mapping[str, Part | None],
    rank: int,
    record: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Truncation:
    """Write a merged task vector as the folder of a LoRA adapter that PEFT loads onto the base.

    Args:
        path: the folder to write.
        base: the pretrained model.
        parts: the merged task vector by tensor, see `cut`.
        rank: of the factors.
        record: what `freemerge.json` says of the merge, see `make_record`.
        dtype: of the factors; None for float32. Tensors that are stored whole have it too, or else the base's.
        overwrite: replace a folder that freemerge wrote.

    Returns:
        The error of the truncation, which is in `freemerge.json` and the model card as well.

    Raises:
        MergeError: a tensor has changed that an adapter cannot change.
        CheckpointError: the folder cannot be written.
    """
    changed = {name: part for name, part in parts.items() if part is not None}
    factored = {name: part for name, part in changed.items() if part.layer is not None}
    whole = {name: part.values[0] for name, part in changed.items() if part.layer is None}
    layers = {name.removesuffix(".weight"): part.layer for name, part in factored.items()}  # by module
    stored: dict[str, Tensor] = {}
    for name, part in factored.items():
        stored |= pack_factors(name, part.layer, base.spec(name).shape, *part.values)
    if not layers:
        raise MergeError(f"{path}: no matrix has changed, so there is nothing for a LoRA adapter to hold")
    biases, modules = _place_whole(path, base, layers, whole, dtype)
    truncation = Truncation(
        math.sqrt(sum(part.lost for part in changed.values()) / sum(part.square for part in changed.values())),
        {name: math.sqrt(part.lost / part.square) for name, part in changed.items()},
    )
    config = make_config(
        rank,
        layers,
        base=base.label,
        turned=Layer.TURNED in layers.values(),
        biases=bool(biases),
        whole={name.rpartition(".")[0] for name in modules},
    )
    record = {**record, "output_format": "lora", "rank": rank, "truncation": truncation._asdict()}
    record["tensors"] = {**record["tensors"], "factored": len(layers), "whole": sorted((*biases, *modules))}
    stored |= {PREFIX + name.removesuffix("bias") + "base_layer.bias": value for name, value in biases.items()}
    stored |= {PREFIX + name: value for name, value in modules.items()}
    files = {
        "freemerge.json": (json.dumps(record, indent=2) + "\n").encode(),
        "README.md": make_adapter_card(record, path.name).encode(),
    }
    write_adapter_folder(path, config, stored, files, overwrite)
    return truncation


def _place_whole(
    path: Path,
    base: Checkpoint,
    layers: Mapping[str, Layer],
    whole: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The new values of biases of layers with factors, and of all tensors of the modules that are stored whole."""

    def value(name: str) -> Tensor:
        old = base.tensor(name).detach().cpu()
        if not old.dtype.is_floating_point:
            return old
        new = old.to(working_dtype(old.dtype))
        return round_to(new + whole[name].cpu() if name in whole else new, dtype or old.dtype, name)

    biases, modules = {}, {}
    for name in whole:
        module, _, last = name.rpartition(".")
        if module in layers and last == "bias" and layers[module] is not Layer.EMBEDDING:
            biases[name] = value(name)
            continue
        own = [other for other in base.names if other.startswith(f"{module}.")]
        if not module or module in layers or any("." in other[len(module) + 1 :] for other in own):
            raise MergeError(_cannot_hold(path, name))
        modules |= {other: value(other) for other in own}
    return biases, modules


def _cannot_hold(path: Path, name: str) -> str:
    return (
        f"{path}: the tensor '{name}' has changed, and an adapter can hold neither factors of it nor the whole of its "
        f"module; write output_format='model', or keep the base's: exclude=['{name}']"
    )
