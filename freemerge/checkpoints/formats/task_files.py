"""Task files: what one fine-tuned task leaves for a later merge, in one safetensors file.

Tensors: `backbone.<name>` and `head.<name>`, so whatever merges checkpoints finds the backbone in it. Where only the
task vector is kept, its tensors are called `backbone.<name>.task_vector`, so that nobody else takes them for weights.
Metadata: kind, task, holds, base_hash, dtypes, seed, metrics; all strings, some of JSON.
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
    """What a task file says of itself.

    Args:
        task: the task's name.
        holds: "weights" of the fine-tuned backbone, or only its "task_vector".
        base_hash: hash of the backbone's weights before fine-tuning (`hash_base`).
        seed: of the run, where one was set.
        metrics: the fit's last metrics.
        dtypes: name → dtype of all tensors of the backbone as it was fine-tuned, which the hash is of.
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
        record: what it says of itself.
        backbone: the fine-tuned backbone's tensors, or its task vector, as `record.holds` says.
        head: the head's tensors, stored as they are.
        dtype: of the backbone's floating-point tensors in the file; None for their own. A task vector in bfloat16 loses
            less than weights in bfloat16: it is rounded relative to itself.

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
    """The values in a dtype, into which all that are finite must fit."""
    if dtype is None or dtype == values.dtype:
        return values
    wide = values if values.dtype == torch.float64 else values.float()  # fp8 can be converted, and not compared
    if bool((torch.isfinite(wide) & (wide.abs() >= largest(dtype))).any()):
        raise CheckpointError(
            f"{path}: the tensor '{name}' has values that do not fit into {str(dtype).removeprefix('torch.')}; "
            "write it in bfloat16 or float32"
        )
    return values.to(dtype)


def read_record(path: str | Path) -> TaskRecord | None:
    """What a task file says of itself; None for any other checkpoint.

    Raises:
        CheckpointError: see `SafetensorsFile` and `parse_record`.
    """
    path = expand(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    return parse_record(SafetensorsFile(path).metadata, str(path))


def parse_record(metadata: Mapping[str, str], label: str) -> TaskRecord | None:
    """The record in a file's metadata; None where there is none.

    Args:
        metadata: of the file.
        label: how messages call it.

    Raises:
        CheckpointError: the metadata are those of a task file, and not whole.
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
            f"{label}: its metadata are not those of a whole task file ({reason}); save the task again"
        ) from None


def open_task_file(checkpoint: Checkpoint) -> Checkpoint:
    """A task file as a model: a task vector's tensors are differences to the base, under the names of its tensors.

    Args:
        checkpoint: the file as it is. One that is no task file comes back unchanged.

    Raises:
        CheckpointError: the file does not hold what its metadata say.
    """
    record = parse_record(checkpoint.metadata, checkpoint.label)
    has_vector = any(name.endswith(_SUFFIX) for name in checkpoint.names)
    # Of a file that has been saved again without its metadata the names tell.
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
