"""Expert files: one safetensors file, packed so that the file is small, not only the count of its values.

    layout   deflated JSON: names and shapes, and how many values each part has
    codes    the values, all parts end to end, as `codec` encodes them, deflated
    scales   float32, one per part
    gaps     the positions of a sparse expert, deflated;  masks  the bits of a masked one

The file's metadata say what it is, how values are encoded, and what the expert's own metadata say: task, density, and
the hashes of the base and of the merged backbone that it belongs to.
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

FORMAT = "freemerge-expert-2"  # in the metadata as `kind`, with the kind of expert; "format" is safetensors' own
_CLASS = "expert.class"  # in the metadata of experts whose class is not freemerge's own
_DTYPES = {"int4": torch.int8, "int8": torch.int8, "bf16": torch.bfloat16, "float32": torch.float32}


def save_expert(path: str | Path, expert: Expert, values: Encoding | None = None) -> Path:
    """Write an expert to a safetensors file, atomically.

    Args:
        path: the file to write; its folder is made if need be.
        expert: the expert; its metadata go into the file's.
        values: how values are stored: `int8` or `int4` with a scale per tensor, `bf16` or `float32`. If not given, as
            in the file the expert came from, else `int8`.

    Returns:
        The path.

    Raises:
        ValueError: if the expert's class has no `KIND` of its own.
    """
    kind = f"{FORMAT}-{kind_of(type(expert))}"
    encoding = values or expert.metadata.get("values", "int8")
    parts = expert.parts()
    codes, scales = encode_values(list(parts.values()), encoding)
    plain, arrays = expert.structure()
    plain["parts"] = [[name, part.numel()] for name, part in parts.items()]
    plain |= {"kind": kind, "values": encoding}  # here, too: who saves the file again may leave the metadata out
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
    """Read an expert; values come back as float32.

    Args:
        path: a file written by `save_expert`.
        merged: weights of the merged backbone, or their hash; when given, an expert made for others is refused.
        base: weights of the base, or their hash; likewise.
        shared: the tensors that the experts of several tasks share, such as the task vector of masked ones.
        trust_remote_code: whether the module of a class from outside freemerge, which the file names, may be imported;
            this runs its code. Not needed where it has been imported.

    Raises:
        CheckpointError: if the file is missing, damaged, no expert, or belongs to another merged backbone or base.
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
        raise CheckpointError(f"{path}: damaged safetensors file ({error}); make the expert again") from error
    for what, weights in (("merged", merged), ("base", base)):
        if weights is not None:
            check_hash(metadata, what, weights if isinstance(weights, str) else hash_tensors(weights), path)
    try:
        expert = _decode(tensors, metadata)
    except (ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged expert file ({error}); make the expert again") from error
    if expert.SHARES:
        known = {} if shared is None else shared
        lacking = [name for name, shape in expert.shapes.items() if name not in known or known[name].shape != shape]
        if lacking:
            raise CheckpointError(
                f"{path}: needs the task vector that its tasks share, with tensor {lacking[0]!r} of shape "
                f"{list(expert.shapes[lacking[0]])}; give it as `shared`"
            )
        expert = replace(expert, shared=shared)
    return expert


def _in_layout(layout: Tensor) -> dict[str, str]:
    """The kind and the encoding of values, from a file that has been saved again without its metadata."""
    try:
        plain = json.loads(inflate(layout, torch.uint8).numpy().tobytes())
        return {name: plain[name] for name in ("kind", "values")}
    except (ValueError, KeyError, TypeError, RuntimeError):
        return {}


def _decode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Expert:
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
    # What else is there was written by safetensors and by `checkpoints`, whose keys are dotted.
    own = {key: value for key, value in metadata.items() if key not in ("format", "kind") and "." not in key}
    return expert_class(metadata["kind"].removeprefix(f"{FORMAT}-")).restored(plain, arrays, parts, own)


def check_hash(metadata: Mapping[str, str], what: str, found: str, path: str | Path) -> None:
    """Raise a CheckpointError if an expert's metadata name other `merged` or `base` weights than those of this hash."""
    expected = metadata.get(f"{what}_hash")
    if expected is not None and expected != found:
        raise CheckpointError(
            f"{path}: this expert belongs to {what} weights {expected[:12]}, the model has {found[:12]}; "
            f"load it beside the {'merged backbone' if what == 'merged' else 'base'} it was made for"
        )
