"""A merged model as a LoRA adapter of its base: the merged difference of each matrix, truncated to a rank.

- Matrices, embeddings, convolutions and stacked experts get two factors each, from a truncated singular value
  decomposition: tensors that files store separately and the model holds as one are assembled first.
- Biases of those layers, and other small tensors (norms), are stored whole: biases as PEFT's `bias`, the others as its
  `modules_to_save`. A tensor that neither can store is an error that names it.
- The truncation error, in the Frobenius norm and relative to the difference, is measured after rounding to the stored
  dtype. It is zero up to rounding if the inputs are adapters whose ranks sum to at most the output's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from freemerge.checkpoints import Checkpoint
from freemerge.checkpoints.formats.adapters.layers import Layer
from freemerge.checkpoints.formats.adapters.layout import Layout, Target
from freemerge.checkpoints.formats.adapters.origin import find_base_id, find_origin
from freemerge.checkpoints.formats.adapters.parsing import PREFIX
from freemerge.checkpoints.formats.adapters.writing import make_config, pack_factors, stems, write_adapter_folder
from freemerge.checkpoints.vocabulary import ties_embeddings
from freemerge.errors import MergeError
from freemerge.merging.engine.card import make_adapter_card
from freemerge.merging.matching.vocabulary import is_embedding
from freemerge.merging.task_vectors import Vectors
from freemerge.tensors.differences import working_dtype
from freemerge.tensors.low_rank import factorize, squared_error
from freemerge.tensors.rounding import round_to


class Part(NamedTuple):
    """The stored form of one tensor's difference: two factors, or the whole."""

    layer: Layer | None  # the kind of layer whose factors these are
    values: tuple[Tensor, ...]  # (n, r) and (r, m), or (*shape)
    lost: float  # the squared truncation error, in the Frobenius norm
    square: float  # the squared norm of the whole difference


class Truncation(NamedTuple):
    """The truncation error relative to the whole difference, in the Frobenius norm."""

    overall: float
    tensors: dict[str, float]


def by_target(path: Path, vectors: Vectors, layout: Layout, combine: Callable[[str, Tensor], Tensor]) -> Vectors:
    """The merged differences of the model's tensors, assembled from those of the stored tensors.

    Args:
        path: the folder to write, for messages.
        vectors: the task vectors of the stored tensors.
        layout: the layout of the base.
        combine: (name, (K, *shape)) → (*shape), the merged difference of one of them.

    Raises:
        MergeError: while reading, if a changed tensor belongs to no module of the model.
    """

    def read(name: str) -> Tensor:
        if name not in layout.targets:
            delta = combine(name, vectors.read(name))
            if bool(delta.any()):
                raise MergeError(
                    f"{path}: the tensor '{name}' has changed and is not part of the model that the base's "
                    "config.json describes, so no adapter can change it; write output_format='model', or keep the "
                    f"base's: exclude=['{name}']"
                )
            return delta
        target = layout.targets[name]
        whole: Tensor | None = None
        for part, place in target.parts:
            if part not in vectors.shapes:
                continue
            delta = combine(part, vectors.read(part))
            if target.is_plain:
                return delta
            if whole is None:
                whole = torch.zeros(target.shape, device=delta.device)
            place.of(whole).copy_(delta)
        assert whole is not None  # a target is only read if one of its parts has a task vector
        return whole

    shapes: dict[str, Sequence[int]] = {}
    for name, shape in vectors.shapes.items():
        target = layout.by_part.get(name)
        shapes |= {name: shape} if target is None else {target.name: target.shape}
    return vectors.regrouped(shapes, read)


def cut(
    path: Path, base: Checkpoint, layout: Layout, name: str, delta: Tensor, rank: int, dtype: torch.dtype | None
) -> Part | None:
    """Truncate the merged difference of one tensor of the model to a rank; None if there is no difference.

    Args:
        path: the folder to write, for messages.
        base: the pretrained model.
        layout: the layout of the base.
        name: name of the tensor.
        delta: its merged difference, float32.
        rank: rank of the factors, at least 1; factors of smaller matrices are padded with zeros, so that all have the
            same rank.
        dtype: dtype of the factors; None for float32.

    Raises:
        MergeError: an adapter cannot store it, or it has NaN or infinite values.
    """
    square = float(delta.square().sum(dtype=torch.float64))
    if square == 0:
        return None
    if not math.isfinite(square):
        raise MergeError(f"{path}: the merged difference of the tensor '{name}' has values that are NaN or infinite")
    target = layout.targets[name]
    held = layout.keeper(target) in layout.kept
    if target.layer is None or held:
        if not held and delta.dim() > 1 and not name.endswith(".weight"):  # too large to store whole
            raise MergeError(_cannot_hold(path, target))
        return Part(None, (delta.to("cpu", copy=True),), 0.0, square)
    if any(_is_tied(base, part) for part, _ in target.parts):
        raise MergeError(
            f"{path}: the tensor '{target.parts[0][0]}' is input and output embedding at once, and PEFT would add its "
            "difference twice when it merges the adapter; write output_format='model', or keep the base's: "
            f"exclude=['{target.parts[0][0]}']"
        )
    if delta.dim() == 3 and target.layer.is_parameter:
        cuts = [_factors(matrix, rank, dtype, name) for matrix in delta]
        return Part(
            target.layer,
            (torch.stack([left for left, _, _ in cuts]), torch.stack([right for _, right, _ in cuts])),
            sum(lost for _, _, lost in cuts),
            square,
        )
    left, right, lost = _factors(delta.flatten(1), rank, dtype, name)
    return Part(target.layer, (left, right), lost, square)


def _is_tied(base: Checkpoint, name: str) -> bool:
    return name in base.tied.values() or (is_embedding(name) and ties_embeddings(base.folder, base.names))


def _factors(matrix: Tensor, rank: int, dtype: torch.dtype | None, name: str) -> tuple[Tensor, Tensor, float]:
    """(m, r) and (r, n), rounded and padded with zeros, and their squared error."""
    left, right = (round_to(factor.cpu(), dtype or torch.float32, name) for factor in factorize(matrix, rank))
    lost = squared_error(matrix.cpu(), left, right)
    missing = rank - right.shape[0]
    return pad(left, (0, missing)), pad(right, (0, 0, 0, missing)), lost


def write_adapter(
    path: Path,
    base: Checkpoint,
    models: Sequence[Checkpoint],
    layout: Layout,
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
        models: the fine-tuned ones.
        layout: the layout of the base.
        parts: the merged task vector by the model's tensors, see `cut`.
        rank: rank of the factors.
        record: the record of the merge for `freemerge.json`, see `make_record`.
        dtype: dtype of the factors; None for float32. Tensors that are stored whole have it too; with None, they have
            the base's.
        overwrite: replace a folder that freemerge wrote.

    Returns:
        The truncation error, which `freemerge.json` and the model card also state.

    Raises:
        MergeError: a tensor has changed that an adapter cannot change.
        CheckpointError: the folder cannot be written.
    """
    # In the model's order, in which PEFT wraps the parameters of a module.
    changed = {name: part for name in layout.targets if (part := parts.get(name)) is not None}
    factored = {name: (part.layer, part.values) for name, part in changed.items() if part.layer is not None}
    whole = {name: part.values[0] for name, part in changed.items() if part.layer is None}
    if not factored:
        raise MergeError(f"{path}: no matrix has changed, so there is nothing to store in a LoRA adapter")
    targets = [(name, layer) for name, (layer, _) in factored.items()]
    beginnings = stems(targets)
    stored: dict[str, Tensor] = {}
    for name, (layer, values) in factored.items():
        stored |= pack_factors(beginnings[name], layer, layout.targets[name].shape, *values)
    biases, modules = _place_whole(path, layout, dict(targets), whole)
    truncation = Truncation(
        math.sqrt(sum(part.lost for part in changed.values()) / sum(part.square for part in changed.values())),
        {name: math.sqrt(part.lost / part.square) for name, part in changed.items()},
    )
    config = make_config(rank, targets, biases=bool(biases), whole=modules, origin=find_origin(base, models, layout))
    kept = list(dict.fromkeys((*biases, *(target.name for module in modules for target in layout.inside(module)))))
    record = {**record, "output_format": "lora", "rank": rank, "truncation": truncation._asdict()}
    record["base"] = {**record["base"], "hub": find_base_id(base, models)[0]}
    record["tensors"] = {**record["tensors"], "factored": len(factored), "whole": sorted(kept)}
    for name in kept:
        stem = name.removesuffix("bias") + "base_layer.bias" if name in biases else name
        stored[PREFIX + stem] = _value(base, layout.targets[name], whole.get(name), dtype)
    files = {
        "freemerge.json": (json.dumps(record, indent=2) + "\n").encode(),
        "README.md": make_adapter_card(record, path.name).encode(),
    }
    write_adapter_folder(path, config, stored, files, overwrite)
    return truncation


def _place_whole(
    path: Path, layout: Layout, factored: Mapping[str, Layer], whole: Iterable[str]
) -> tuple[list[str], list[str]]:
    """The biases that are stored beside factors, and the modules that are stored whole."""
    layers = {layout.targets[name].module: layer for name, layer in factored.items()}
    biases, modules = [], dict.fromkeys(layout.needs)
    for name in whole:
        target = layout.targets[name]
        module = layout.keeper(target)
        if module in layers and name.endswith(".bias") and layers[module] is not Layer.EMBEDDING:
            biases.append(name)
            continue
        inner = any("." in other.name[len(module) + 1 :] for other in layout.inside(module))
        if not module or module in layers or (inner and module not in layout.kept):
            raise MergeError(_cannot_hold(path, target))
        modules[module] = None
    # PEFT matches the ends of names, even without a dot before: "norm" also matches "input_layernorm".
    for name in layout.modules:
        if name not in modules and name.endswith(tuple(modules)) and not any(name.startswith(f"{m}.") for m in modules):
            if any(other == name or other.startswith(f"{name}.") for other in layers) or not layout.inside(name):
                kept = next(module for module in modules if name.endswith(module))
                raise MergeError(
                    f"{path}: PEFT would keep '{name}', which has factors, whole: it keeps '{kept}', whose name is the "
                    f"end of it; write output_format='model', or keep the base's: exclude=['{kept}.*']"
                )
            modules[name] = None
    return biases, list(modules)


def _value(base: Checkpoint, target: Target, delta: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """The new value of a tensor that is stored whole."""
    parts = {name: base.tensor(name).detach().cpu() for name, _ in target.parts}
    old = next(iter(parts.values())).dtype
    value = target.assemble(parts, working_dtype(old) if old.is_floating_point else old, torch.device("cpu"))
    if not old.is_floating_point:
        return value
    return round_to(value if delta is None else value + delta, dtype or old, target.name)


def _cannot_hold(path: Path, target: Target) -> str:
    name = target.parts[0][0]
    return (
        f"{path}: the tensor '{name}' has changed, and an adapter can hold neither factors of it nor the whole of its "
        f"module; write output_format='model', or keep the base's: exclude=['{name}']"
    )
