"""A merge whose inputs are opened, checked and planned, but whose values have not been read yet."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freemerge.checkpoints import Checkpoint, TensorSpec, locate, open_checkpoint
from freemerge.checkpoints.buffers import is_constant, is_statistic
from freemerge.checkpoints.formats.adapters.layout import Layout, read_layout
from freemerge.checkpoints.opening import Source
from freemerge.checkpoints.stacking import parse_stack
from freemerge.errors import MergeError, MergeWarning
from freemerge.merging.checks.bases import check_bases
from freemerge.merging.engine.meter import Meter
from freemerge.merging.engine.output import Output
from freemerge.merging.engine.plan import Plan, make_plan
from freemerge.merging.engine.reader import Reader
from freemerge.merging.engine.record import make_record
from freemerge.merging.folders.choice import Files, choose_files
from freemerge.merging.folders.parts import companions_of, describe_parts
from freemerge.merging.matching.vocabulary import Embeddings
from freemerge.merging.methods.base import MergeMethod
from freemerge.merging.methods.per_pattern import with_overrides
from freemerge.merging.methods.weight_average import WeightAverage
from freemerge.runtime.collector import without_collections
from freemerge.runtime.processes import Processes

_log = logging.getLogger(__name__)
_NAMED = 10  # number of tensors that a message names


@dataclass(frozen=True)
class Job:
    """A merge that is ready to start.

    Args:
        method: how to merge, overrides included.
        reader: reads the tensors of the plan.
        meter: counts the bytes read.
        processes: the processes that share the work.
        include: the given patterns, for the record.
        exclude: likewise.
        companions: the other files of a model folder.
        layout: the layout of the base's modules, for an adapter.
    """

    method: MergeMethod
    reader: Reader
    meter: Meter
    processes: Processes
    include: Sequence[str] | None
    exclude: Sequence[str] | None
    companions: Files | None
    layout: Layout | None

    @property
    def plan(self) -> Plan:
        """The plan for every tensor."""
        return self.reader.plan

    def describe(self, hash_inputs: bool) -> dict[str, Any]:
        """The record of the merge: method, inputs with their hashes, versions."""
        record = make_record(
            self.plan, self.method, include=self.include, exclude=self.exclude, hash_inputs=hash_inputs
        )
        return record if self.companions is None else {**record, "files": self.companions.record()}


def label_sources(finetuned: Sequence[Source] | Mapping[str, Source]) -> list[tuple[str | None, Source]]:
    if isinstance(finetuned, (str, os.PathLike)):
        raise MergeError(f"the fine-tuned models must be a list or a dict; write [{str(finetuned)!r}]")
    if isinstance(finetuned, Mapping):
        if any(isinstance(value, Tensor) for value in finetuned.values()):
            raise MergeError("the fine-tuned models must be a list or a dict of models; this is one state dict")
        return list(finetuned.items())
    return [
        (None if isinstance(source, (str, os.PathLike, Checkpoint)) else f"model {index}", source)
        for index, source in enumerate(finetuned)
    ]


def prepare(
    base: Source,
    labelled: Sequence[tuple[str | None, Source]],
    method: MergeMethod,
    output: Output | None,
    *,
    overrides: Sequence[Mapping[str, Any]] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    dtype: torch.dtype | str | None = None,
    embeddings: Embeddings = "error",
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    distributed: bool = False,
    locate: Callable[[str | os.PathLike[str]], Path] = locate,
) -> Job:
    """Open and check the inputs, and plan the merge; see `merge` for the arguments.

    `locate` finds the path of a model.

    The caller closes the job's processes.

    Raises:
        MergeError: the inputs do not fit.
        CheckpointError: a file cannot be read.
    """
    sources = [base, *(source for _, source in labelled)]
    method = with_overrides(method, overrides)
    # Each path is located once, because a name on the Hub is a request; messages call the model as the caller does.
    places = [_locate(source, locate) for source in sources]
    labels = ["base" if places[0] is None and not isinstance(base, str) else None, *(label for label, _ in labelled)]
    with without_collections():
        opened, *models = (
            open_checkpoint(source, label=label)
            if place is None
            else open_checkpoint(place, label=str(source) if label is None else label)
            for source, place, label in zip(sources, places, labels, strict=True)
        )
        found = companions_of(places, [opened, *models])
        folder = output if output is not None and output.is_folder else None
        plan = make_plan(
            opened,
            models,
            include,
            exclude,
            parse_dtype(dtype),
            embeddings,
            parse_device(device),
            [each.modules for each in found] if folder is not None else None,
        )
        companions = (
            choose_files(found, plan, folder.companions_from, folder.chat_template_from, folder.trust_remote_code)
            if folder is not None
            else None
        )
        layout = _read_layout(plan, output) if output is not None and output.is_adapter else None
    method.check([model.label for model in plan.models])
    is_copy = len(models) == 1 and isinstance(method, WeightAverage)  # the mean of one model is that model
    if not is_copy and any(map(is_statistic, plan.averaged)):
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
        note = companions.note if companions is not None else describe_parts(found[1:])
        if note and processes.rank == 0:
            warnings.warn(note, MergeWarning, stacklevel=3)
        reader = Reader(plan)
        meter = Meter(reader, method, progress, processes.size)
    except BaseException:
        processes.close()
        raise
    return Job(method, reader, meter, processes, include, exclude, companions, layout)


def _locate(source: Source, locate: Callable[[str | os.PathLike[str]], Path]) -> Path | None:
    """The path of a model that has one: one in memory and a stack of layers have none."""
    if isinstance(source, str):
        return locate(source) if parse_stack(source) is None else None
    return locate(source) if isinstance(source, os.PathLike) else None


def _read_layout(plan: Plan, output: Output) -> Layout:
    """The layout of the base's modules, if an adapter can store the result."""
    if plan.untied:
        name, first = next(iter(plan.untied.items()))
        raise MergeError(
            f"{output.path}: '{name}' is tied to '{first}' in the base and no longer in the result, and PEFT would add "
            "both differences to the one tensor when it merges the adapter; write output_format='model'"
        )
    return read_layout(plan.base)


def _say_left_out(plan: Plan) -> None:
    """Warn about tensors of the models that are left out of the merge."""
    for model in plan.models:
        # Constants and integers are not trained.
        specs = {name: model.spec(name) for name in model.names}
        names = [name for name in plan.left_out(model) if name not in specs or _is_trained(name, specs[name])]
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            text = f"{model.label}: left out, as the base has no such tensors: {', '.join(names[:_NAMED])}{more}"
            warnings.warn(text, MergeWarning, stacklevel=4)


def _is_trained(name: str, spec: TensorSpec) -> bool:
    return spec.dtype.is_floating_point and not is_constant(name, spec)


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
    except (RuntimeError, AssertionError) as error:  # AssertionError if torch was built without CUDA
        reason = str(error).splitlines()[0].split(". ")[0]
        raise MergeError(f"cannot compute on the device '{device}': {reason}") from None
    return found
