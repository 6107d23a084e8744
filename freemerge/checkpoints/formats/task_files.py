"""Task files: the result of fine-tuning one task, kept for a later merge in one safetensors file.

Tensors: `backbone.<name>` and `head.<name>`, so any tool that merges checkpoints finds the backbone in it. If only the
task vector is kept, its tensors are named `backbone.<name>.task_vector`, so that other tools do not mistake them for
weights. Metadata: kind, task, holds, base_hash, dtypes, seed, metrics; all strings, some of JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from freemerge.checkpoints.checkpoint import Checkpoint
from freemerge.checkpoints.formats.safetensors_files import SafetensorsFile
from freemerge.checkpoints.places import expand
from freemerge.checkpoints.writing.saving import save_checkpoint
from freemerge.errors import CheckpointError
from freemerge.tensors.precision import largest

KIND = "freemerge-task-1"
Held = Literal["weights", "task_vector"]

_HELD: tuple[Held, ...] = ("weights", "task_vector")
_SUFFIX = ".task_vector"


@dataclass(frozen=True)
class TaskRecord:
    """The metadata of a task file.

    Args:
        task: the task's name.
        holds: "weights" for the fine-tuned backbone, or "task_vector".
        base_hash: hash of the backbone's weights before fine-tuning (`hash_base`).
        seed: the seed of the run, if one was set.
        metrics: the last metrics of the fit.
        dtypes: name → dtype of all tensors of the backbone during fine-tuning; part of what the hash covers.
    """

    task: str
    holds: Held
    base_hash: str
    seed: int | None
    metrics: dict[str, float]
    dtypes: dict[str, torch.dtype] = field(default_factory=dict, compare=False)


def write_task_file(
    path: Path,
    record: TaskRecord,
    backbone: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> None:
    """Write a task file, atomically.

    Args:
        path: the file.
        record: the file's metadata.
        backbone: the fine-tuned backbone's tensors, or its task vector, according to `record.holds`.
        head: the head's tensors, stored as they are.
        dtype: dtype of the backbone's floating-point tensors in the file; None keeps their own. A task vector loses
            less in bfloat16 than weights do, because rounding is relative to its own, smaller values.

    Raises:
        CheckpointError: a value is too large for `dtype`, or the file cannot be written.
    """
    suffix = _SUFFIX if record.holds == "task_vector" else ""
    tensors = {
        f"backbone.{name}{suffix}": _rounded(path, name, value, dtype) if value.is_floating_point() else value
        for name, value in backbone.items()
    }
    metadata = {
        "kind": KIND,
        "task": record.task,
        "holds": record.holds,
        "base_hash": record.base_hash,
        "dtypes": json.dumps({name: str(each).removeprefix("torch.") for name, each in record.dtypes.items()}),
        "seed": json.dumps(record.seed),
        "metrics": json.dumps(record.metrics),
    }
    save_checkpoint(path, tensors | {f"head.{name}": value for name, value in head.items()}, metadata)


def _rounded(path: Path, name: str, values: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Convert values to a dtype; finite values that overflow it are an error."""
    if dtype is None or dtype == values.dtype:
        return values
    wide = values if values.dtype == torch.float64 else values.float()  # fp8 supports conversion but no comparison
    if bool((torch.isfinite(wide) & (wide.abs() >= largest(dtype))).any()):
        raise CheckpointError(
            f"{path}: the tensor '{name}' has values that do not fit into {str(dtype).removeprefix('torch.')}; "
            "write it in bfloat16 or float32"
        )
    return values.to(dtype)


def read_record(path: str | Path) -> TaskRecord | None:
    """The metadata of a task file; None for any other checkpoint.

    Raises:
        CheckpointError: see `SafetensorsFile` and `parse_record`.
    """
    path = expand(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    return parse_record(SafetensorsFile(path).metadata, str(path))


def parse_record(metadata: Mapping[str, str], label: str) -> TaskRecord | None:
    """Parse the record in a file's metadata; None if there is none.

    Args:
        metadata: the file's metadata.
        label: the file's name in messages.

    Raises:
        CheckpointError: the metadata is that of a task file, but incomplete.
    """
    if metadata.get("kind") != KIND:
        return None
    try:
        dtypes = {name: getattr(torch, dtype) for name, dtype in json.loads(metadata.get("dtypes", "{}")).items()}
        seed, metrics = json.loads(metadata["seed"]), json.loads(metadata["metrics"])
        holds = next((kind for kind in _HELD if kind == metadata["holds"]), None)
        if holds is None:
            raise ValueError(metadata["holds"])
        return TaskRecord(metadata["task"], holds, metadata["base_hash"], seed, metrics, dtypes)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{label}: the metadata of this task file is incomplete or damaged ({reason}); save the task again"
        ) from None


def open_task_file(checkpoint: Checkpoint) -> Checkpoint:
    """A task file as a model: the tensors of a task vector become differences to the base, under the base's names.

    Args:
        checkpoint: the opened file. A checkpoint that is not a task file is returned unchanged.

    Raises:
        CheckpointError: the file's tensors do not match its metadata.
    """
    record = parse_record(checkpoint.metadata, checkpoint.label)
    has_vector = any(name.endswith(_SUFFIX) for name in checkpoint.names)
    # The names identify a task vector that was re-saved without its metadata.
    says_vector = has_vector if record is None else record.holds == "task_vector"
    if not says_vector:
        return checkpoint
    if not has_vector:
        raise CheckpointError(
            f"{checkpoint.label}: its metadata say that it holds a task vector, and no tensor is called "
            f"'…{_SUFFIX}': it was saved again by other names; keep the names, or leave the metadata out"
        )
    names = {name: name.removesuffix(_SUFFIX) for name in (*checkpoint.names, *checkpoint.tied)}
    return checkpoint.as_deltas(names, [name for name in names if name.endswith(_SUFFIX)])
