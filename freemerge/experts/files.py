"""Expert files: one safetensors file per expert, compressed so that few values also take few bytes.

    layout   deflated JSON: names, shapes and the number of values of each part
    codes    the values of all parts, concatenated, encoded by `codec` and deflated
    scales   float32, one per part
    gaps     the positions of a sparse expert, deflated
    masks    the bits of a masked expert, deflated

The file's metadata hold the kind of expert, the encoding of its values and the expert's own metadata: its task, its
density, and the hashes of the base and of the merged backbone that it was made for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from freemerge.checkpoints import CheckpointError, expand, hash_tensors, save_checkpoint
from freemerge.experts.base import Expert, class_path, expert_class, kind_of
from freemerge.experts.codec import Encoding, decode_values, deflate, encode_values, inflate

FORMAT = "freemerge-expert-2"  # in the metadata as `kind`, followed by the kind of expert
_CLASS = "expert.class"  # the metadata's key for the path of a class from outside freemerge
_DTYPES = {"int4": torch.int8, "int8": torch.int8, "bf16": torch.bfloat16, "float32": torch.float32}


def save_expert(path: str | Path, expert: Expert, values: Encoding | None = None) -> Path:
    """Write an expert to a safetensors file, atomically.

    Args:
        path: the file to write; its folder is created if it is missing.
        expert: the expert; its metadata become part of the file's.
        values: encoding of the values: `int8` or `int4` with a scale per part, `bf16` or `float32`. By default the
            encoding of the file that the expert came from, otherwise `int8`.

    Returns:
        The path.

    Raises:
        ValueError: if the expert's class has no `KIND` of its own, or its values are not finite.
    """
    kind = f"{FORMAT}-{kind_of(type(expert))}"
    encoding = values or expert.metadata.get("values", "int8")
    parts = expert.parts()
    codes, scales = encode_values(list(parts.values()), encoding)
    plain, arrays = expert.structure()
    plain["parts"] = [[name, part.numel()] for name, part in parts.items()]
    plain |= {"kind": kind, "values": encoding}  # also here: other tools may save the file without its metadata
    text = json.dumps(plain, separators=(",", ":"), ensure_ascii=False).encode()
    tensors = {
        "codes": deflate(codes.cpu()),
        "scales": scales.cpu(),
        "layout": deflate(torch.frombuffer(bytearray(text), dtype=torch.uint8)),
    }
    tensors |= {name: deflate(array.cpu()) for name, array in arrays.items()}
    path = expand(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    named = {} if (of := class_path(type(expert))) is None else {_CLASS: of}
    save_checkpoint(path, tensors, metadata={**expert.metadata, **named, "kind": kind, "values": encoding})
    return path


def load_expert(
    path: str | Path,
    merged: Mapping[str, Tensor] | str | None = None,
    base: Mapping[str, Tensor] | str | None = None,
    shared: Mapping[str, Tensor] | None = None,
    trust_remote_code: bool = False,
) -> Expert:
    """Read an expert.

    Args:
        path: a file written by `save_expert`.
        merged: weights of the merged backbone, or their hash; if given, experts made for other weights are refused.
        base: weights of the base, or their hash; if given, experts made for other weights are refused.
        shared: tensor name → tensor that the experts of several tasks share, such as the task vector of masked experts.
        trust_remote_code: whether the module of a class from outside freemerge may be imported, which runs its code.
            Not needed if it has already been imported.

    Returns:
        The expert, with float32 values.

    Raises:
        CheckpointError: if the file is missing, damaged, not an expert, was made for another merged backbone or base,
            names a class that may not or cannot be imported, or needs shared tensors that are not given.
    """
    path = expand(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            if "kind" not in metadata and "layout" in file.keys():  # noqa: SIM118 (not a dict)
                metadata |= _in_layout(file.get_tensor("layout"))
            kind = metadata.get("kind", "")
            if not kind.startswith(f"{FORMAT}-"):
                raise CheckpointError(f"{path}: not an expert file (kind {kind!r}, expected {FORMAT}-…)")
            try:
                expert_class(kind.removeprefix(f"{FORMAT}-"), metadata.get(_CLASS), trust_remote_code)
            except ValueError as error:
                raise CheckpointError(f"{path}: {error}") from error
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such expert file") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged safetensors file ({error}); create the expert again") from error
    for what, weights in (("merged", merged), ("base", base)):
        if weights is not None:
            check_hash(metadata, what, weights if isinstance(weights, str) else hash_tensors(weights), path)
    try:
        expert = _decode(tensors, metadata)
    except (ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged expert file ({error}); create the expert again") from error
    if expert.SHARES:
        known = {} if shared is None else shared
        lacking = [name for name, shape in expert.shapes.items() if name not in known or known[name].shape != shape]
        if lacking:
            raise CheckpointError(
                f"{path}: needs the task vector that its tasks share, with tensor {lacking[0]!r} of shape "
                f"{list(expert.shapes[lacking[0]])}; pass it as `shared=`"
            )
        expert = replace(expert, shared=shared)
    return expert


def _in_layout(layout: Tensor) -> dict[str, str]:
    """The kind and the encoding of the values, for a file that another tool saved without its metadata."""
    try:
        plain = json.loads(inflate(layout, torch.uint8).numpy().tobytes())
        return {name: plain[name] for name in ("kind", "values")}
    except (ValueError, KeyError, TypeError, RuntimeError):
        return {}


def _decode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Expert:
    """The expert of a file's tensors and metadata."""
    plain = json.loads(inflate(tensors["layout"], torch.uint8).numpy().tobytes())
    sizes = dict(plain["parts"])
    codes = inflate(tensors["codes"], _DTYPES[metadata["values"]])
    if len(codes) != sum(sizes.values()) or len(tensors["scales"]) != len(sizes):
        raise ValueError(f"{len(codes)} values, {sum(sizes.values())} expected")
    parts = dict(zip(sizes, decode_values(codes, tensors["scales"], list(sizes.values())), strict=True))
    arrays = {
        name: inflate(packed, torch.uint8)
        for name, packed in tensors.items()
        if name not in ("layout", "codes", "scales")
    }
    # The other keys were written by safetensors and by `checkpoints`, whose keys have dots.
    own = {key: value for key, value in metadata.items() if key not in ("format", "kind") and "." not in key}
    return expert_class(metadata["kind"].removeprefix(f"{FORMAT}-")).restored(plain, arrays, parts, own)


def check_hash(metadata: Mapping[str, str], what: str, found: str, path: str | Path) -> None:
    """Check that an expert was made for the weights with a given hash.

    Args:
        metadata: the expert's metadata; without a hash in them, every model is accepted.
        what: `merged` or `base`.
        found: the hash of the model's weights.
        path: the expert's file, for the message.

    Raises:
        CheckpointError: if the hashes differ.
    """
    expected = metadata.get(f"{what}_hash")
    if expected is not None and expected != found:
        raise CheckpointError(
            f"{path}: this expert belongs to {what} weights {expected[:12]}, the model has {found[:12]}; "
            f"load it with the {'merged backbone' if what == 'merged' else 'base'} it was made for"
        )
