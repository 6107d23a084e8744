"""Estimates of what a merge would do, from names, shapes, dtypes and the method's properties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from freemerge.checkpoints import TensorSpec
from freemerge.merging.engine.executor import MERGED_BY_CHUNKS, copies_of_largest
from freemerge.merging.engine.reader import Reader
from freemerge.merging.methods.base import MergeMethod
from freemerge.runtime.threads import team_size
from freemerge.tensors.chunks import CHUNK


@dataclass(frozen=True)
class Estimate:
    """A merge that has been checked and planned.

    Args:
        merged: names of the tensors to merge.
        kept: names of those that keep the base's values.
        tied: name → the name it is tied to.
        parameters: number of merged values.
        passes: number of passes over the models.
        read: bytes read in all passes, without the hashing of the inputs.
        memory: approximate upper bound of the bytes of working memory, without the imported libraries and a result in
            memory.
        files: file name → bytes of its tensors, for the files that would be written.
    """

    merged: tuple[str, ...]
    kept: tuple[str, ...]
    tied: Mapping[str, str]
    parameters: int
    passes: int
    read: int
    memory: int
    files: Mapping[str, int]

    def __str__(self) -> str:
        size = sum(self.files.values())
        shards = f" in {len(self.files)} files" if len(self.files) > 1 else ""
        return (
            f"{len(self.merged):,} tensors of {self.parameters:,} parameters to merge, {len(self.kept):,} to keep, "
            f"{len(self.tied):,} tied; {self.passes} {'pass' if self.passes == 1 else 'passes'} over the models, "
            f"{_gigabytes(self.read)} to read; about {_gigabytes(self.memory)} of memory; "
            f"{_gigabytes(size)} to write{shards}"
        )


def estimate(
    reader: Reader, method: MergeMethod, shards: Mapping[str, Mapping[str, TensorSpec]], read: int
) -> Estimate:
    """Estimate a merge.

    Args:
        reader: reads the tensors of the merge's plan.
        method: its method.
        shards: file name → specs of its tensors, for the files that would be written.
        read: bytes that it would read.
    """
    plan = reader.plan
    sizes = [shape.numel() for shape in plan.shapes.values()]
    chunks = team_size() * MERGED_BY_CHUNKS * (reader.chunk or CHUNK)
    whole = copies_of_largest(method, len(plan.models)) * max(sizes)
    return Estimate(
        plan.merged,
        plan.kept,
        dict(plan.tied),
        sum(sizes),
        method.passes,
        read,
        4 * max(chunks, whole),
        {file: sum(map(_size, specs.values())) for file, specs in shards.items()},
    )


def _size(spec: TensorSpec) -> int:
    return torch.Size(spec.shape).numel() * spec.dtype.itemsize


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
