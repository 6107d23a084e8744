"""`merge`: from models to a merged model, checked, planned, surveyed, merged and written."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freemerge.checkpoints import Checkpoint, TensorSpec, open_checkpoint
from freemerge.checkpoints.buffers import is_constant, is_statistic
from freemerge.checkpoints.formats.adapters.layout import Layout, read_layout
from freemerge.checkpoints.formats.safetensors_files import storage_order
from freemerge.checkpoints.opening import WEIGHT_FILES, Source
from freemerge.checkpoints.places import expand, landing
from freemerge.checkpoints.writing.draft import Draft
from freemerge.checkpoints.writing.folder import check_folder, make_index, parse_size, plan_shards
from freemerge.errors import MergeError, MergeWarning
from freemerge.merging.checks.bases import check_bases
from freemerge.merging.engine.adapter_output import by_target, cut, write_adapter
from freemerge.merging.engine.estimate import Estimate, estimate
from freemerge.merging.engine.executor import Memory, Merging, Meter
from freemerge.merging.engine.plan import Plan, make_plan
from freemerge.merging.engine.record import make_files, make_record
from freemerge.merging.folders.choice import Files, choose_files
from freemerge.merging.folders.parts import describe_parts, look_around
from freemerge.merging.methods.base import MergeMethod
from freemerge.merging.methods.per_pattern import with_overrides
from freemerge.runtime.processes import Processes
from freemerge.runtime.threads import one_thread

_log = logging.getLogger(__name__)
_NAMED = 10  # tensors that a message names


def merge(
    base: Source,
    finetuned: Sequence[Source] | Mapping[str, Source],
    method: MergeMethod,
    *,
    overrides: Sequence[Mapping[str, Any]] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    dtype: torch.dtype | str | None = None,
    embeddings: str = "error",
    output: str | os.PathLike[str] | None = None,
    output_format: str = "model",
    rank: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    shard_size: int | str = "5GB",
    hash_inputs: bool = True,
    companions_from: str | None = None,
    device: torch.device | str | None = None,
    distributed: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor] | Path | Estimate:
    """Merge fine-tuned models of one base.

    All arithmetic is in float32, whatever the storage dtype (fp8 too), and rounded once, to nearest even; a value that
    does not fit into the result's dtype is an error, never infinite and never cut off. Integer and boolean tensors, and
    those that the patterns leave out, keep the base's values; tied tensors stay tied. The inputs are never modified.

    Args:
        base: the pretrained model: a state dict, a module, or the path of a checkpoint (see `open_checkpoint`).
        finetuned: the fine-tuned models, in a list or by name. They may hold the base's tensors under a common prefix,
            or be folders of LoRA adapters.
        method: how to merge.
        overrides: other parameters for some of the tensors, `[{"match": "*.mlp.*", "scale": 0.4}]`; see
            `with_overrides`.
        include: names of the tensors to merge: globs, or regular expressions after `re:`. None for all.
        exclude: names of the tensors to leave as in the base, and of the heads that only fine-tuned models have.
        dtype: of the result's floating-point tensors, for example "bfloat16"; None for the base's own.
        embeddings: what to do where a fine-tuned model has other rows of the vocabulary than the base (added tokens,
            padding): "error", or merge by rows, in which row i is token i of every model and the result has the
            base's rows, configuration and tokenizer. "base": every row that the base has; a model that lacks it
            counts as one that did not change it, and rows beyond the base's are dropped. "common": only the rows that
            the base and all models have; the others stay as in the base.
        output: what to write instead of returning tensors: a `.safetensors` file, or a folder for Hugging Face's
            `from_pretrained`, with the files around the base's weights (configuration, tokenizer, code, licence; see
            `checkpoints.companions`), a model card and `freemerge.json`. It appears whole or not at all. Of a link,
            what it leads to is written.
        output_format: "model", or "lora" for the folder of a LoRA adapter of the base, which PEFT loads: each merged
            difference cut to `rank`, with the error of the cut in `freemerge.json` and the model card.
        rank: of the adapter's factors; the same for all tensors.
        overwrite: replace an existing `output`; of folders only those that freemerge wrote.
        shard_size: largest file of weights in a folder, in bytes or such as "500MB".
        resume: go on with what an interrupted merge into this output had finished, if the inputs (by their hashes,
            unless those are left out: then by their names) and all parameters are the same; and keep what is finished
            if this one fails.
        hash_inputs: record hashes of all inputs in the folder's `freemerge.json`, which takes a pass over them.
        companions_from: whose files a folder takes: the name or path of a fine-tuned model, for its configuration,
            tokenizer and chat template, with the base's where it has none; "base"; or None for the base's and a
            `MergeWarning` of what all fine-tuned models have otherwise.
        device: where to compute, for example "cuda"; None for where the tensors are. Files are read and written by
            threads, each with a stream of its own, so that copies and arithmetic overlap.
        distributed: share the work with all processes of torch.distributed's default group. Each must make this same
            call, reach the inputs, and see the same output folder; the files are the same as from one process.
        dry_run: check everything that can be told without reading values, and return what would be done.
        progress: called with the bytes read so far by this process and in all that it will read, now and then, from
            any thread.

    Returns:
        All tensors of the base by name, in memory of their own, on the base's device; or the path written; or, of a
        dry run, the estimate.

    Raises:
        MergeError: the models do not fit the base, were fine-tuned from another (where a task file says so), or a value
            is NaN or infinite.
        CheckpointError: a file cannot be read or written.
    """
    labelled = _labelled(finetuned)
    sources = [base, *(source for _, source in labelled)]
    if output is not None:
        output = _check_output(expand(output), overwrite, sources)
    _check_format(output_format, rank, output)
    if output is None and (distributed or resume):
        raise MergeError(f"a {'distributed' if distributed else 'resumed'} merge has to write its result")
    if resume and output_format == "lora":
        raise MergeError("the merge into an adapter cannot be resumed: nothing of it is on the disk before its end")
    is_folder = output is not None and output.suffix != ".safetensors" and output_format == "model"
    if companions_from is not None and not is_folder:
        raise MergeError("companions_from is of a model's folder; give output= a path without the ending .safetensors")
    shard_bytes = parse_size(shard_size)
    method = with_overrides(method, overrides)
    with _collector_paused():
        opened = open_checkpoint(base, label=None if isinstance(base, (str, os.PathLike)) else "base")
        models = [open_checkpoint(source, label=label) for label, source in labelled]
        found = look_around(sources, [opened, *models])
        around = found if is_folder else None
        plan = make_plan(
            opened,
            models,
            include,
            exclude,
            parse_dtype(dtype),
            embeddings,
            parse_device(device),
            [each.modules for each in around] if around else None,
        )
        beside = choose_files(around, plan, companions_from) if around else None
        if output_format == "lora" and plan.untied:
            name, first = next(iter(plan.untied.items()))
            raise MergeError(
                f"{output}: '{name}' is tied to '{first}' in the base and no longer in the result, and PEFT would add "
                "both differences to the one tensor when it merges the adapter; write output_format='model'"
            )
        layout = read_layout(plan.base) if output_format == "lora" else None
    method.check([model.label for model in plan.models])
    if any(map(is_statistic, plan.averaged)):
        _log.warning(
            "%d statistics of batch norms are averaged; running_mean and running_var that are measured anew on data of "
            "all tasks suit the merged weights better: freemerge.models.reestimate_batch_norm",
            len(plan.averaged),
        )
    if output is not None:
        _say_left_out(plan)
    processes = Processes(distributed)
    try:
        processes.first(lambda: check_bases(opened, plan.models))
        note = beside.note if beside is not None else describe_parts(found[1:])
        if note and processes.rank == 0:
            warnings.warn(note, MergeWarning, stacklevel=2)
        meter = Meter(plan, method, progress, processes.size)
        if dry_run:
            return estimate(plan, method, _shards(plan, output, shard_bytes, beside), meter.total)
        if output is None:
            with one_thread() if plan.resident else nullcontext():
                return _merge_in_memory(plan, method, meter)
        hash_inputs = hash_inputs and output.suffix != ".safetensors"

        def describe() -> dict[str, Any]:
            record = make_record(plan, method, include=include, exclude=exclude, hash_inputs=hash_inputs)
            return record if beside is None else {**record, "files": beside.record()}

        if output_format == "lora":
            _write_lora(plan, method, meter, processes, describe, output, rank, layout, overwrite)
        else:
            _write_model(plan, method, meter, processes, describe, output, shard_bytes, resume, beside)
    finally:
        processes.close()
    return output


def _say_left_out(plan: Plan) -> None:
    """Name the tensors of the models that have no part in the merge."""
    for model in plan.models:
        # Constants and integers are nothing that was trained.
        specs = {name: model.spec(name) for name in model.names}
        names = [name for name in plan.left_out(model) if name not in specs or _is_trained(name, specs[name])]
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            text = f"{model.label}: left out, as the base has no such tensors: {', '.join(names[:_NAMED])}{more}"
            warnings.warn(text, MergeWarning, stacklevel=3)


def _is_trained(name: str, spec: TensorSpec) -> bool:
    return spec.dtype.is_floating_point and not is_constant(name, spec)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """No garbage collection: tables of many tensors are no garbage, and it would walk them again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The torch dtype of a name such as "bfloat16" or "torch.float16".

    Raises:
        MergeError: torch has no such floating-point dtype.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise MergeError(f"there is no dtype '{dtype}'; use float32, bfloat16 or float16")
    return found


def parse_device(device: torch.device | str | None) -> torch.device | None:
    """The torch device of a name such as "cuda" or "cuda:1"; of GPUs the current one if it has no number.

    Raises:
        MergeError: there is no such device.
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
        if found.type == "cuda" and found.index is None:
            found = torch.device("cuda", torch.cuda.current_device())
        torch.empty(1, device=found).item()
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        reason = str(error).splitlines()[0].split(". ")[0]
        raise MergeError(f"cannot compute on the device '{device}': {reason}") from None
    return found


def _merge_in_memory(plan: Plan, method: MergeMethod, meter: Meter) -> dict[str, Tensor]:
    tensors = Memory(plan.specs)
    statistics = method.collect_statistics(meter.vectors(Processes()))
    Merging(plan, method, statistics, tensors, meter).run(list(plan.specs))
    return {name: tensors[plan.tied.get(name, name)] for name in plan.base.names}


def _write_lora(
    plan: Plan,
    method: MergeMethod,
    meter: Meter,
    processes: Processes,
    describe: Callable[[], dict[str, Any]],
    output: Path,
    rank: int,
    layout: Layout,
    overwrite: bool,
) -> None:
    """Write the folder of an adapter; the processes share the model's tensors."""
    statistics = method.collect_statistics(meter.vectors(processes))

    def combine(name: str, deltas: Tensor) -> Tensor:
        return deltas.mean(dim=0) if name in plan.averaged else method.combine(name, deltas, statistics)

    differences = by_target(output, meter.vectors(processes, averaged=True), layout, combine)
    parts = differences.map(lambda name, delta: cut(output, plan.base, layout, name, delta, rank, plan.dtype))
    processes.first(
        lambda: write_adapter(
            output, plan.base, plan.models, layout, parts, rank, describe(), dtype=plan.dtype, overwrite=overwrite
        )
    )


def _write_model(
    plan: Plan,
    method: MergeMethod,
    meter: Meter,
    processes: Processes,
    describe: Callable[[], dict[str, Any]],
    output: Path,
    shard_bytes: int,
    resume: bool,
    beside: Files | None,
) -> None:
    """Write a file, or a folder with the files beside the weights, with all processes."""
    shards = _shards(plan, output, shard_bytes, beside)
    draft = Draft(output, shards, plan.tied, processes.rank)

    def begin() -> dict[str, Any]:
        record = describe()
        draft.begin(_key(record, shards), resume)
        return record

    record = processes.first(begin)
    try:
        if beside is not None:
            processes.first(lambda: draft.copy(beside.copied))
        draft.open()
        statistics = method.collect_statistics(meter.vectors(processes))
        merging = Merging(plan, method, statistics, draft, meter)
        names = [name for specs in shards.values() for name in storage_order(specs) if name not in draft.finished]
        own = processes.share({name: plan.specs[name].shape for name in names})
        processes.together(lambda: (merging.run(own), draft.flush(), draft.close_files()))
        files = None
        if beside is not None:
            files = {**beside.made, **make_files(record, output.name), **make_index(shards)}
        processes.first(lambda: draft.commit(files))
    except BaseException:
        if processes.rank == 0 and not resume:
            draft.discard()
        raise
    finally:
        draft.close()


def _shards(
    plan: Plan, output: Path | None, shard_bytes: int, beside: Files | None
) -> dict[str, dict[str, TensorSpec]]:
    """What is written: file name → specs of its tensors."""
    if output is None:
        return {}
    if output.suffix == ".safetensors":
        return {landing(output).name: plan.specs}
    return plan_shards(plan.specs, shard_bytes, beside.modules if beside else ())


def _key(record: Mapping[str, Any], shards: Mapping[str, Mapping[str, TensorSpec]]) -> str:
    """Of all that the weights of an output depend on."""
    text = json.dumps([record, {file: list(map(str, specs.items())) for file, specs in shards.items()}])
    return hashlib.sha256(text.encode()).hexdigest()


def _labelled(finetuned: Sequence[Source] | Mapping[str, Source]) -> list[tuple[str | None, Source]]:
    if isinstance(finetuned, (str, os.PathLike)):
        raise MergeError(f"the fine-tuned models come in a list or a dict; write [{str(finetuned)!r}]")
    if isinstance(finetuned, Mapping):
        if any(isinstance(value, Tensor) for value in finetuned.values()):
            raise MergeError("the fine-tuned models come in a list or a dict of models; this is one state dict")
        return list(finetuned.items())
    return [
        (None if isinstance(source, (str, os.PathLike, Checkpoint)) else f"model {index}", source)
        for index, source in enumerate(finetuned)
    ]


def _check_format(output_format: str, rank: int | None, output: Path | None) -> None:
    if output_format not in ("model", "lora"):
        raise MergeError(f"output_format must be 'model' or 'lora', got {output_format!r}")
    if (output_format == "lora") != (rank is not None):
        raise MergeError(
            "output_format='lora' needs the rank of the adapter, such as rank=16"
            if rank is None
            else "rank is of an adapter; give output_format='lora' as well"
        )
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise MergeError(f"rank must be a positive number, got {rank!r}")
    if output_format == "lora" and (output is None or output.suffix == ".safetensors"):
        raise MergeError("an adapter is a folder; give output= a path without the ending .safetensors")


def _check_output(output: Path, overwrite: bool, sources: Sequence[Source]) -> Path:
    place = landing(output).resolve()
    paths = [expand(source).resolve() for source in sources if isinstance(source, (str, os.PathLike))]
    if any(path in place.parents and path.is_dir() for path in paths):
        raise MergeError(f"{output}: lies in the folder of an input, which it would change; choose another output")
    for path in paths:  # its own weights may be replaced
        if place in path.parents and (path.parent != place or path.name not in WEIGHT_FILES):
            raise MergeError(f"{output}: holds the input {path}, which would be lost; choose another output")
    if output.suffix in (".pt", ".pth", ".bin", ".ckpt", ".gguf"):
        raise MergeError(f"{output}: the output must be a .safetensors file or a folder")
    if output.suffix != ".safetensors":
        check_folder(output, overwrite)
    elif output.exists() and not overwrite:
        raise MergeError(f"{output}: exists already; choose another output, or overwrite it with overwrite=True")
    return output
