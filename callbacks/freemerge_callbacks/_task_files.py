"""Task files: what one fine-tuned task leaves for a later merge, in one safetensors file.

Tensors: `backbone.<name>` and `head.<name>`, so whatever merges checkpoints finds the backbone in it. Where only the
task vector is kept, its tensors are called `backbone.<name>.task_vector`: nobody can take them for weights by mistake.
Metadata: kind, task, holds, base_hash, seed, metrics (JSON), freemerge's version; all strings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import freemerge
from freemerge.checkpoints import Checkpoint, TensorSpec, open_checkpoint, save_checkpoint
from freemerge.checkpoints.safetensors_files import SafetensorsFile
from freemerge.merging import task_vector
from freemerge_callbacks._base import read
from freemerge_callbacks._weights import find_prefix

KIND = "freemerge-task-1"
_SUFFIX = ".task_vector"


@dataclass(frozen=True)
class TaskRecord:
    """What a task file says of itself.

    Args:
        task: the task's name.
        holds: "weights" of the fine-tuned backbone, or only its "task_vector".
        base_hash: hash of the backbone's weights before fine-tuning.
        seed: of the run, where one was set.
        metrics: the fit's last metrics.
    """

    task: str
    holds: Literal["weights", "task_vector"]
    base_hash: str
    seed: int | None
    metrics: dict[str, float]


def write_task_file(
    path: Path,
    record: TaskRecord,
    weights: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    base: Checkpoint | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a task file, atomically.

    Args:
        path: the file.
        record: what it says of itself.
        weights: the fine-tuned backbone's tensors.
        head: the head's tensors, stored as they are.
        base: the base, under the backbone's own names or those inside it; needed for a task vector.
        dtype: of the backbone's floating-point tensors in the file; None for that of the module. A task vector in
            bfloat16 loses less than weights in bfloat16: it is rounded relative to itself.
    """
    if record.holds == "task_vector":
        prefix = find_prefix(weights, base.names)
        start = {prefix + name: base.tensor(name) for name in base.names if prefix + name in weights}
        weights = {name + _SUFFIX: value for name, value in task_vector(start, weights).items()}
    tensors = {
        f"backbone.{name}": value.to(dtype) if dtype and value.is_floating_point() else value
        for name, value in weights.items()
    }
    metadata = {
        "kind": KIND,
        "task": record.task,
        "holds": record.holds,
        "base_hash": record.base_hash,
        "seed": json.dumps(record.seed),
        "metrics": json.dumps(record.metrics),
        "freemerge": freemerge.__version__,
    }
    save_checkpoint(path, tensors | {f"head.{name}": value for name, value in head.items()}, metadata)


def read_record(path: str | Path) -> TaskRecord | None:
    """What a task file says of itself; None for any other checkpoint."""
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return None
    found = SafetensorsFile(path).metadata
    if found.get("kind") != KIND:
        return None
    seed, metrics = json.loads(found["seed"]), json.loads(found["metrics"])
    return TaskRecord(found["task"], found["holds"], found["base_hash"], seed, metrics)


def open_finetuned(path: str | Path, base: Checkpoint) -> Checkpoint:
    """A fine-tuned model, from a task file of either kind or any other checkpoint.

    Args:
        path: the checkpoint.
        base: the base, to which a task vector is added as it is read, tensor by tensor, in float32.
    """
    record = read_record(path)
    if record is None or record.holds == "weights":
        return open_checkpoint(path)
    file = open_checkpoint(path, prefix="backbone.")
    names = [name.removesuffix(_SUFFIX) for name in file.names]
    prefix = find_prefix(names, base.names)
    shared = [name for name in names if name.startswith(prefix)]
    specs = {name[len(prefix) :]: TensorSpec(file.spec(name + _SUFFIX).shape, torch.float32) for name in shared}

    def add(name: str, run: tuple[int, int] | None) -> Tensor:
        vector = read(file, prefix + name + _SUFFIX, run).float()
        return read(base, name, run).float() + vector if name in base else vector

    return Checkpoint(str(path), specs, add, tied={name: first for name, first in base.tied.items() if first in specs})
