"""`merge`: from models to a merged model, tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freemerge.checkpoints import Checkpoint, open_checkpoint
from freemerge.checkpoints.folder import check_folder, companions, parse_size, plan_shards, write_folder
from freemerge.checkpoints.opening import Source
from freemerge.checkpoints.safetensors_files import storage_order, write_safetensors
from freemerge.merging.errors import MergeError
from freemerge.merging.method import MergeMethod
from freemerge.merging.per_pattern import with_overrides
from freemerge.merging.plan import Operands, Plan, make_plan
from freemerge.merging.provenance import make_files, make_record
from freemerge.merging.streaming import pieces, read_ahead
from freemerge.merging.vectors import add


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
    overwrite: bool = False,
    shard_size: int | str = "5GB",
    hash_inputs: bool = True,
) -> dict[str, Tensor] | Path:
    """Merge fine-tuned models of one base.

    All arithmetic is in float32, whatever the storage dtype. Integer and boolean tensors, and those that the patterns
    leave out, keep the base's values; tied tensors stay tied. The inputs are never modified.

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
            `from_pretrained`, with the base's configuration and tokenizer, a model card and `freemerge.json`. It
            appears whole or not at all.
        overwrite: replace an existing `output`; of folders only those that freemerge wrote.
        shard_size: largest file of weights in a folder, in bytes or such as "500MB".
        hash_inputs: record hashes of all inputs in the folder's `freemerge.json`, which takes a pass over them.

    Returns:
        All tensors of the base by name, in memory of their own, on the base's device; or the path written.

    Raises:
        MergeError: the models do not fit the base, or a value is NaN or infinite.
        CheckpointError: a file cannot be read or written.
    """
    if output is not None:
        output = _check_output(Path(output), overwrite)
    shard_bytes = parse_size(shard_size)
    method = with_overrides(method, overrides)
    plan = make_plan(
        open_checkpoint(base, label=None if isinstance(base, (str, os.PathLike)) else "base"),
        [open_checkpoint(source, label=label) for label, source in _labelled(finetuned)],
        include,
        exclude,
        parse_dtype(dtype),
        embeddings,
    )
    method.check([model.label for model in plan.models])
    statistics = method.survey(plan.vectors())
    if output is None:
        tensors = dict(_merged(plan, method, statistics, list(plan.specs)))
        return {name: tensors[plan.tied.get(name, name)] for name in plan.base.names}
    specs = plan.specs
    if output.suffix == ".safetensors":
        write_safetensors(output, specs, _merged(plan, method, statistics, storage_order(specs)), tied=plan.tied)
        return output
    names = [name for shard in plan_shards(specs, shard_bytes).values() for name in shard]
    record = make_record(plan, method, include=include, exclude=exclude, hash_inputs=hash_inputs)
    write_folder(
        output,
        specs,
        _merged(plan, method, statistics, names),
        make_files(record, _companions(base), output.name),
        shard_size=shard_bytes,
        tied=plan.tied,
        overwrite=overwrite,
    )
    return output


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


def _merged(plan: Plan, method: MergeMethod, statistics: Any, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the result, one by one, in memory of their own."""
    chosen = set(plan.merged)
    merged = [name for name in names if name in chosen]
    # An elementwise method sees pieces: memory is then bounded by the piece, not by the largest tensor times K.
    shapes = {name: torch.Size(plan.base.spec(name).shape) for name in merged}
    jobs = pieces(shapes, len(plan.models)) if method.elementwise else iter(merged)
    with closing(read_ahead(plan.read, jobs, depth=2 if method.elementwise else 1)) as operands:
        for name in names:
            if name not in chosen:
                yield name, plan.base.tensor(name).to(plan.output_dtype(name), copy=True).contiguous()
            elif method.elementwise:
                yield name, _joined(name, operands, plan, method, statistics)
            else:
                yield name, _combined(name, next(operands), plan, method, statistics).contiguous()


def _joined(name: str, operands: Iterator[Operands], plan: Plan, method: MergeMethod, statistics: Any) -> Tensor:
    """Merge the pieces of one tensor."""
    shape = torch.Size(plan.base.spec(name).shape)
    result: Tensor | None = None
    done, total = 0, shape.numel()
    while done < total:
        part = _combined(name, next(operands), plan, method, statistics)
        if result is None:
            result = part if len(part) == total else part.new_empty(total)
        if result is not part:
            result[done : done + len(part)] = part
        done += len(part)
    if result is None:  # a tensor without values
        result = torch.empty(0, dtype=plan.output_dtype(name))
    return result.view(shape)


def _combined(name: str, operands: Operands, plan: Plan, method: MergeMethod, statistics: Any) -> Tensor:
    """Merge a tensor or a piece of one and add it to the base's."""
    base, deltas, single, start = operands
    before = deltas[0].clone() if single is not None else None  # a method may overwrite what it is given
    if start is None:
        delta = method.combine(name, deltas, statistics)
    else:
        delta = method.combine_run(name, start, deltas, statistics)
    if delta.shape != base.shape:
        raise MergeError(
            f"{type(method).__name__}.combine returned shape {list(delta.shape)} for the tensor '{name}', expected "
            f"{list(base.shape)}"
        )
    result = add(base, delta, plan.output_dtype(name))
    if single is not None:
        # Where a single model's entry comes through unchanged, base + (model − base) is meant to be the model's own
        # value, and in floating point it is not always.
        result = torch.where(delta == before, single.to(result.device, result.dtype), result)
    return result


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


def _companions(base: Source) -> dict[str, Path]:
    """The configuration and tokenizer files beside the base's weights, if it is a folder or lies in one."""
    if not isinstance(base, (str, os.PathLike)):
        return {}
    folder = Path(base) if Path(base).is_dir() else Path(base).parent
    return companions(folder) if (folder / "config.json").is_file() else {}


def _check_output(output: Path, overwrite: bool) -> Path:
    if output.suffix in (".pt", ".pth", ".bin", ".ckpt", ".gguf"):
        raise MergeError(f"{output}: the output must be a .safetensors file or a folder")
    if output.suffix != ".safetensors":
        check_folder(output, overwrite)
    elif output.exists() and not overwrite:
        raise MergeError(f"{output}: exists already; choose another output, or overwrite it with overwrite=True")
    return output
