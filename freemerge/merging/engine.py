"""`merge`: from models to a merged model, tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freemerge.checkpoints import Checkpoint, open_checkpoint
from freemerge.checkpoints.opening import Source
from freemerge.checkpoints.safetensors_files import storage_order, write_safetensors
from freemerge.merging.errors import MergeError
from freemerge.merging.method import MergeMethod
from freemerge.merging.plan import Plan, make_plan
from freemerge.merging.vectors import add


def merge(
    base: Source,
    finetuned: Sequence[Source] | Mapping[str, Source],
    method: MergeMethod,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    dtype: torch.dtype | str | None = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> dict[str, Tensor] | Path:
    """Merge fine-tuned models of one base.

    All arithmetic is in float32, whatever the storage dtype. Integer and boolean tensors, and those that the patterns
    leave out, keep the base's values; tied tensors stay tied. The inputs are never modified.

    Args:
        base: the pretrained model: a state dict, a module, or the path of a checkpoint (see `open_checkpoint`).
        finetuned: the fine-tuned models, in a list or by name. They may hold the base's tensors under a common prefix.
        method: how to merge.
        include: names of the tensors to merge: globs, or regular expressions after `re:`. None for all.
        exclude: names of the tensors to leave as in the base, and of the heads that only fine-tuned models have.
        dtype: of the result's floating-point tensors, for example "bfloat16"; None for the base's own.
        output: a `.safetensors` file to write instead of returning tensors.
        overwrite: replace an existing `output`.

    Returns:
        All tensors of the base by name, in memory of their own, on the base's device; or the path written.

    Raises:
        MergeError: the models do not fit the base, or a value is NaN or infinite.
        CheckpointError: a file cannot be read or written.
    """
    if output is not None:
        output = _check_output(Path(output), overwrite)
    plan = make_plan(
        open_checkpoint(base, label=None if isinstance(base, (str, os.PathLike)) else "base"),
        [open_checkpoint(source, label=label) for label, source in _labelled(finetuned)],
        include,
        exclude,
        parse_dtype(dtype),
    )
    method.check([model.label for model in plan.models])
    statistics = method.survey(plan.vectors())
    if output is None:
        tensors = dict(_merged(plan, method, statistics, list(plan.specs)))
        return {name: tensors[plan.tied.get(name, name)] for name in plan.base.names}
    specs = plan.specs
    write_safetensors(output, specs, _merged(plan, method, statistics, storage_order(specs)), tied=plan.tied)
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
    merged = set(plan.merged)
    for name in names:
        if name not in merged:
            yield name, plan.base.tensor(name).to(plan.output_dtype(name), copy=True).contiguous()
            continue
        base, tensors, deltas = plan.read(name)
        delta = method.combine(name, deltas, statistics)
        if delta.shape != base.shape:
            raise MergeError(
                f"{type(method).__name__}.combine returned shape {list(delta.shape)} for the tensor '{name}' of shape "
                f"{list(base.shape)}"
            )
        result = add(base, delta, plan.output_dtype(name))
        if len(tensors) == 1:
            # Where a single model's entry comes through unchanged, base + (model − base) is meant to be the model's
            # own value, and in floating point it is not always.
            own = tensors[0].to(base.device, result.dtype)
            result = torch.where(delta == deltas[0], own, result)
        yield name, result.contiguous()


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


def _check_output(output: Path, overwrite: bool) -> Path:
    if output.suffix != ".safetensors":
        raise MergeError(f"{output}: the output must be a .safetensors file")
    if output.exists() and not overwrite:
        raise MergeError(f"{output}: exists already; choose another output, or overwrite it with overwrite=True")
    return output
