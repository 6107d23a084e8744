"""Writes a merge: one file, the folder of a model, or the folder of an adapter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from freemerge.checkpoints import TensorSpec
from freemerge.checkpoints.formats.safetensors_files import storage_order
from freemerge.checkpoints.places import landing
from freemerge.checkpoints.writing.draft import Draft
from freemerge.checkpoints.writing.folder import make_index, plan_shards
from freemerge.merging.engine.adapter_output import by_target, cut, write_adapter
from freemerge.merging.engine.card import make_files
from freemerge.merging.engine.combiner import Combiner
from freemerge.merging.engine.executor import Executor
from freemerge.merging.engine.job import Job
from freemerge.merging.engine.output import Output
from freemerge.tensors.differences import add


def write_merge(job: Job, output: Output) -> None:
    """Merge and write, with all processes.

    Raises:
        MergeError: a value is NaN or infinite, or does not fit into the result's dtype or into an adapter.
        CheckpointError: a file cannot be read or written.
    """
    if output.is_adapter:
        _write_adapter(job, output)
    else:
        _write_model(job, output)


def plan_files(job: Job, output: Output | None) -> dict[str, dict[str, TensorSpec]]:
    """The files to write: file name → specs of its tensors."""
    if output is None:
        return {}
    if output.is_file:
        return {landing(output.path).name: job.plan.specs}
    return plan_shards(job.plan.specs, output.shard_bytes, job.companions.modules if job.companions else ())


def _write_adapter(job: Job, output: Output) -> None:
    """Write the folder of an adapter; the processes share the model's tensors."""
    plan, layout = job.plan, job.layout
    assert layout is not None  # set for every adapter output, like the rank
    assert output.rank is not None
    vectors = job.meter.vectors(job.processes)
    combiner = Combiner.of(job.method, vectors, plan.averaged)

    def combine(name: str, deltas: Tensor) -> Tensor:
        merged = combiner.difference(name, deltas)
        if plan.base.spec(name).dtype.itemsize < 4:  # an overflow check: PEFT will round like this
            add(name, job.reader.read_base(name), merged, job.method)
        return merged

    rank, path = output.rank, output.path
    differences = by_target(path, vectors, layout, combine)
    parts = differences.map(lambda name, delta: cut(path, plan.base, layout, name, delta, rank, plan.dtype))
    job.processes.first(
        lambda: write_adapter(
            path,
            plan.base,
            plan.models,
            layout,
            parts,
            rank,
            job.describe(output.hash_inputs),
            dtype=plan.dtype,
            overwrite=output.overwrite,
        )
    )


def _write_model(job: Job, output: Output) -> None:
    """Write a file, or a folder with its companions; the processes share the tensors."""
    plan, processes, companions = job.plan, job.processes, job.companions
    shards = plan_files(job, output)
    draft = Draft(output.path, shards, plan.tied, processes.rank)

    def begin() -> dict[str, Any]:
        record = job.describe(output.hash_inputs and not output.is_file)
        draft.begin(_key(record, shards), output.resume)
        return record

    def write(names: Sequence[str]) -> None:
        executor.run(names)
        draft.flush()
        draft.close_files()

    record = processes.first(begin)
    try:
        if companions is not None:
            processes.first(lambda: draft.copy(companions.copied))
        draft.open()
        combiner = Combiner.of(job.method, job.meter.vectors(processes), plan.averaged)
        executor = Executor(job.reader, combiner, draft, job.meter)
        names = [name for specs in shards.values() for name in storage_order(specs) if name not in draft.finished]
        own = processes.share({name: plan.specs[name].shape for name in names})
        processes.together(lambda: write(own))
        files = None
        if companions is not None:
            files = {**companions.made, **make_files(record, output.path.name), **make_index(shards)}
        processes.first(lambda: draft.commit(files))
    except BaseException:
        if processes.rank == 0 and not output.resume:
            draft.discard()
        raise
    finally:
        draft.close()


def _key(record: Mapping[str, Any], shards: Mapping[str, Mapping[str, TensorSpec]]) -> str:
    """A hash of everything that the weights of an output depend on."""
    text = json.dumps([record, {file: list(map(str, specs.items())) for file, specs in shards.items()}])
    return hashlib.sha256(text.encode()).hexdigest()
