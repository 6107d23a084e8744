"""The three ways to merge: `merge` returns tensors, `merge_to` writes files, `plan_merge` only checks and plans."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from freemerge.checkpoints.opening import Source
from freemerge.checkpoints.remote_headers import RemoteHeaders
from freemerge.merging.engine.combiner import Combiner
from freemerge.merging.engine.estimate import Estimate, estimate
from freemerge.merging.engine.executor import Executor, Memory
from freemerge.merging.engine.job import label_sources, prepare
from freemerge.merging.engine.output import OutputFormat, make_output
from freemerge.merging.engine.writing import plan_files, write_merge
from freemerge.merging.matching.vocabulary import Embeddings
from freemerge.merging.methods.base import MergeMethod
from freemerge.runtime.threads import one_thread


class _Selecting(TypedDict, total=False):
    """Options that select what is merged and where; see `merge`."""

    overrides: Sequence[Mapping[str, Any]] | None
    include: Sequence[str] | None
    exclude: Sequence[str] | None
    dtype: torch.dtype | str | None
    embeddings: Embeddings
    device: torch.device | str | None
    progress: Callable[[int, int], None] | None


class _Writing(TypedDict, total=False):
    """Options for writing a merge; see `merge_to`."""

    output_format: OutputFormat
    rank: int | None
    overwrite: bool
    resume: bool
    shard_size: int | str
    hash_inputs: bool
    companions_from: str | None
    chat_template_from: str | None
    trust_remote_code: bool
    distributed: bool


class _Options(_Selecting, _Writing, total=False):
    """All options of a merge."""


@overload
def merge(
    base: Source,
    finetuned: Sequence[Source] | Mapping[str, Source],
    method: MergeMethod,
    *,
    output: None = None,
    dry_run: Literal[False] = False,
    **options: Unpack[_Options],
) -> dict[str, Tensor]: ...
@overload
def merge(
    base: Source,
    finetuned: Sequence[Source] | Mapping[str, Source],
    method: MergeMethod,
    *,
    output: str | os.PathLike[str],
    dry_run: Literal[False] = False,
    **options: Unpack[_Options],
) -> Path: ...
@overload
def merge(
    base: Source,
    finetuned: Sequence[Source] | Mapping[str, Source],
    method: MergeMethod,
    *,
    output: str | os.PathLike[str] | None = None,
    dry_run: bool,
    **options: Unpack[_Options],
) -> dict[str, Tensor] | Path | Estimate: ...
def merge(
    base: Source,
    finetuned: Sequence[Source] | Mapping[str, Source],
    method: MergeMethod,
    *,
    overrides: Sequence[Mapping[str, Any]] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    dtype: torch.dtype | str | None = None,
    embeddings: Embeddings = "error",
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    output: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    **writing: Unpack[_Writing],
) -> dict[str, Tensor] | Path | Estimate:
    """Merge fine-tuned models of one base, in memory.

    All arithmetic is in float32, whatever the storage dtype (fp8 too), and rounded once, to nearest even; a value that
    overflows the result's dtype is an error and is never made infinite or clamped. Integer and boolean tensors, and
    those that the patterns leave out, keep the base's values; tied tensors stay tied. The inputs are never modified.

    Args:
        base: the pretrained model: a state dict, a module, or the path of a checkpoint (see `open_checkpoint`).
        finetuned: the fine-tuned models, in a list or by name. They may hold the base's tensors under a common prefix,
            or be folders of LoRA adapters.
        method: how to merge.
        overrides: other parameters for some of the tensors, `[{"match": "*.mlp.*", "scale": 0.4}]`; see
            `with_overrides`.
        include: names of the tensors to merge: globs, or regular expressions after `re:`. None for all.
        exclude: names of the tensors to keep from the base, and of heads that only the fine-tuned models have.
        dtype: dtype of the result's floating-point tensors, for example "bfloat16"; None for the base's own.
        embeddings: what to do if a fine-tuned model has other vocabulary rows than the base (added tokens, padding):
            "error", or merge by rows, in which row i is token i of every model and the result has the base's rows,
            configuration and tokenizer. "base": every row that the base has; a model that lacks a row is treated as not
            having changed it, and rows beyond the base's are dropped. "common": only the rows that the base and all
            models have; the others stay as in the base.
        device: where to compute, for example "cuda"; None for where the tensors are. Files are read and written by
            threads, each with a stream of its own, so that copies and arithmetic overlap.
        progress: called from any thread, now and then, with the bytes that this process has read so far and the bytes
            that it will read in total.
        output: the file or folder to write instead of returning tensors, as `merge_to` does.
        dry_run: only check and plan, as `plan_merge` does.
        writing: see `merge_to`.

    Returns:
        All tensors of the base by name, in new memory on the base's device; or the result of `merge_to` or
        `plan_merge`.

    Raises:
        MergeError: the models do not fit the base, were fine-tuned from another (where a task file says so), a value is
            NaN or infinite, or overflows the result's dtype.
        CheckpointError: a file cannot be read.
    """
    selecting: _Selecting = {
        "overrides": overrides,
        "include": include,
        "exclude": exclude,
        "dtype": dtype,
        "embeddings": embeddings,
        "device": device,
        "progress": progress,
    }
    if dry_run:
        return plan_merge(base, finetuned, method, output, **selecting, **writing)
    if output is not None:
        return merge_to(base, finetuned, method, output, **selecting, **writing)
    labelled = label_sources(finetuned)
    make_output(None, (), **writing)
    job = prepare(base, labelled, method, None, **selecting)
    plan = job.plan
    with one_thread() if job.reader.resident else nullcontext():
        tensors = Memory(plan.specs)
        combiner = Combiner.of(job.method, job.meter.vectors(job.processes), plan.averaged)
        Executor(job.reader, combiner, tensors, job.meter).run(list(plan.specs))
    return {name: tensors[plan.tied.get(name, name)] for name in plan.base.names}


def merge_to(
    base: Source,
    finetuned: Sequence[Source] | Mapping[str, Source],
    method: MergeMethod,
    output: str | os.PathLike[str],
    *,
    output_format: OutputFormat = "model",
    rank: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    shard_size: int | str = "5GB",
    hash_inputs: bool = True,
    companions_from: str | None = None,
    chat_template_from: str | None = None,
    trust_remote_code: bool = False,
    distributed: bool = False,
    **options: Unpack[_Selecting],
) -> Path:
    """Merge fine-tuned models of one base into a file or a folder.

    No model is ever whole in memory.

    Args:
        base: see `merge`, also for `finetuned`, `method` and all options that are not listed here.
        finetuned: the fine-tuned models.
        method: how to merge.
        output: what to write: a `.safetensors` file, or a folder for Hugging Face's `from_pretrained`, with the files
            around the base's weights (configuration, tokenizer, code, licence; see `checkpoints.companions`), a model
            card and `freemerge.json`. It is written atomically. A link is followed.
        output_format: "model", or "lora" for the folder of a LoRA adapter of the base, which PEFT loads: each merged
            difference is truncated to `rank`; `freemerge.json` and the model card state the truncation error.
        rank: rank of the adapter's factors, the same for all tensors.
        overwrite: replace an existing `output`; folders only if freemerge wrote them.
        resume: continue an interrupted merge into this output if the inputs (by their hashes or, if these are disabled,
            by their names) and all parameters are the same; and keep the finished part if this merge fails.
        shard_size: largest file of weights in a folder, in bytes or such as "500MB".
        hash_inputs: record hashes of all inputs in the folder's `freemerge.json`, which takes a pass over them.
        companions_from: the model whose files a folder takes: the name or path of a fine-tuned model, for its
            configuration, tokenizer and chat template, with the base's where it has none; "base"; or None for the
            base's files, with a `MergeWarning` about what all fine-tuned models have in common but the base has not.
        chat_template_from: the model whose chat template a folder takes: name or path of one of the models, another
            model's folder or name on the Hub, or a `.jinja` file; None for that of the other files.
        trust_remote_code: take the Python code of a folder along; otherwise it is left out, with a `MergeWarning`. It
            is never run here.
        distributed: share the work with all processes of torch.distributed's default group. Each must make this same
            call, reach the inputs, and see the same output folder; the files are the same as from one process.
        options: the other options of `merge`.

    Returns:
        The path written.

    Raises:
        MergeError: see `merge`.
        CheckpointError: a file cannot be read or written.
    """
    labelled = label_sources(finetuned)
    target = make_output(
        output,
        [base, *(source for _, source in labelled)],
        output_format=output_format,
        rank=rank,
        overwrite=overwrite,
        resume=resume,
        shard_size=shard_size,
        hash_inputs=hash_inputs,
        companions_from=companions_from,
        chat_template_from=chat_template_from,
        trust_remote_code=trust_remote_code,
        distributed=distributed,
    )
    assert target is not None
    job = prepare(base, labelled, method, target, distributed=distributed, **options)
    try:
        write_merge(job, target)
    finally:
        job.processes.close()
    return target.path


def plan_merge(
    base: Source,
    finetuned: Sequence[Source] | Mapping[str, Source],
    method: MergeMethod,
    output: str | os.PathLike[str] | None = None,
    *,
    overrides: Sequence[Mapping[str, Any]] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    dtype: torch.dtype | str | None = None,
    embeddings: Embeddings = "error",
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    **writing: Unpack[_Writing],
) -> Estimate:
    """Check a merge as far as possible without reading values, and report what it would do.

    Of models of the Hub that are not in the cache, only small files and the headers of weights are downloaded.

    Args:
        base: see `merge`, also for all other options listed here.
        finetuned: the fine-tuned models.
        method: how to merge.
        output: the file or folder that would be written; None if tensors would be returned.
        writing: see `merge_to`.

    Returns:
        The tensors that take part, and estimates of the bytes read, written and held in memory.

    Raises:
        MergeError: see `merge`.
        CheckpointError: a file cannot be read, or could not be written.
    """
    labelled = label_sources(finetuned)
    target = make_output(output, [base, *(source for _, source in labelled)], **writing)
    with RemoteHeaders() as remote:
        job = prepare(
            base,
            labelled,
            method,
            target,
            overrides=overrides,
            include=include,
            exclude=exclude,
            dtype=dtype,
            embeddings=embeddings,
            device=device,
            progress=progress,
            distributed=writing.get("distributed", False),
            locate=remote.locate,
        )
        try:
            return estimate(job.reader, job.method, plan_files(job, target), job.meter.total)
        finally:
            job.processes.close()
