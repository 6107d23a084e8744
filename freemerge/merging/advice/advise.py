"""`advise`: what the checkpoints tell before a merge, as a pure function of the models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from freemerge.checkpoints import Checkpoint
from freemerge.checkpoints.opening import Source
from freemerge.merging.advice.measured import LINES, REFERENCE, best_line
from freemerge.merging.advice.relations import Relations, measure
from freemerge.merging.engine.job import label_sources, prepare
from freemerge.merging.engine.plan import Plan
from freemerge.merging.engine.record import describe_method
from freemerge.merging.methods.base import MergeMethod
from freemerge.merging.methods.filters import Filter, NyquistDisc
from freemerge.merging.methods.task_arithmetic import TaskArithmetic
from freemerge.runtime.threads import one_thread

_UNEQUAL = 3.0  # ratio of the longest task vector's norm to the shortest's from which they are far apart
_LONGER = 3.0  # likewise of one model's to the median of the others
_DUPLICATE = 0.95  # cosine of two models that learned the same
_COMMON = 0.7  # smallest cosine of all pairs from which they have a common part that no task explains
_FAR = 0.5  # norm relative to the base's from which a task vector is no small step
_NAMED = 3  # tensors that a warning names


@dataclasses.dataclass(frozen=True)
class Advice:
    """How fine-tuned models relate, what is known to harm their merge, and a merge to begin with.

    Args:
        relations: the measurements.
        warnings: what is known to harm a merge of such models, one line each.
        method: the method to begin with, at the scale to begin with.
        reason: why, and which pages of docs/benchmarks support it.
    """

    relations: Relations
    warnings: tuple[str, ...]
    method: MergeMethod
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """The advice as plain data for JSON."""
        relations = dataclasses.asdict(self.relations) | {"relative_norms": self.relations.relative_norms}
        return {
            "relations": relations,
            "warnings": list(self.warnings),
            "method": describe_method(self.method),
            "reason": self.reason,
        }


def advise(
    base: Source,
    finetuned: Sequence[Source] | Mapping[str, Source],
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    filter: Filter | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Advice:
    """Compare fine-tuned models of one base before a merge, from their weights alone.

    One pass over the models, in the memory of an elementwise merge, and a look at up to twelve of their matrices.

    Args:
        base: the pretrained model, as `merge` takes it.
        finetuned: the fine-tuned models, in a list or by name; adapters too.
        include: names of the tensors to compare, see `merge`.
        exclude: names of the tensors to leave out.
        filter: the filter whose removed energy is measured; FR-Merging's default if None.
        device: where to compute, for example "cuda"; None for where the tensors are.
        progress: called from any thread, now and then, with the bytes read so far and the bytes to read in total.

    Returns:
        The measurements, warnings and a method.

    Raises:
        MergeError: the models do not fit the base, or a value is NaN or infinite.
        CheckpointError: a file cannot be read.
    """
    job = prepare(
        base,
        label_sources(finetuned),
        TaskArithmetic(),  # reads every value once, as this does
        None,
        include=include,
        exclude=exclude,
        embeddings="base",
        device=device,
        progress=progress,
    )
    try:
        with one_thread() if job.reader.resident else nullcontext():
            relations = measure(job.reader, filter or NyquistDisc(), job.meter.count)
    finally:
        job.processes.close()
    warnings = (*warnings_of(relations), *warnings_of_inputs(job.plan))
    method, reason = suggest(relations)
    return Advice(relations, warnings, method, reason)


def warnings_of(relations: Relations) -> list[str]:
    """What is known to harm a merge of models that relate so, one line each."""
    return [*_zeros(relations), *_distances(relations), *_likenesses(relations)]


def _zeros(relations: Relations) -> list[str]:
    return [
        f"{label}: its weights equal the base's, so its task vector is zero; leave it out, or look whether it is the "
        "file you meant"
        for label, norm in zip(relations.labels, relations.norms, strict=True)
        if norm == 0
    ]


def _distances(relations: Relations) -> list[str]:
    """Warnings about norms."""
    found = []
    norms = {label: norm for label, norm in zip(relations.labels, relations.norms, strict=True) if norm > 0}
    for label, relative in zip(relations.labels, relations.relative_norms, strict=True):
        if relative >= _FAR:
            found.append(
                f"{label}: its task vector is {relative:.2f} times as long as the base itself; it may come from "
                "another base, and task vectors so long interfere in every sum"
            )
    if len(norms) < 2:
        return found
    longest, shortest = max(norms, key=norms.__getitem__), min(norms, key=norms.__getitem__)
    ratio = norms[longest] / norms[shortest]
    if ratio >= _UNEQUAL:
        middle = _median(list(norms.values()))
        scales = ", ".join(f"{min(1.0, middle / norm) if norm else 1.0:.2g}" for norm in relations.norms)
        found.append(
            f"norms are far apart: {longest}'s task vector is {ratio:.1f} times as long as {shortest}'s. Sums follow "
            "the longest, and methods that assume equal norms suffer most (arXiv 2508.01148); a scale for each model "
            f"evens them: scale [{scales}]"
        )
    for label, norm in norms.items():
        others = [other for name, other in norms.items() if name != label]
        if len(others) > 1 and norm >= _LONGER * _median(others):
            found.append(
                f"{label}: its task vector is {norm / _median(others):.1f} times as long as the median of the others; "
                "it was trained longer or with a larger learning rate; an earlier checkpoint of it would merge better"
            )
    return found


def _likenesses(relations: Relations) -> list[str]:
    """Warnings about angles."""
    pairs = [
        (relations.cosines[i][j], relations.labels[i], relations.labels[j])
        for i in range(len(relations.labels))
        for j in range(i)
        if relations.norms[i] > 0 and relations.norms[j] > 0
    ]
    found = [
        f"{one} and {other} are nearly the same model (cosine {cosine:.3f}): together they count twice; leave one out, "
        "or give each half the scale"
        for cosine, other, one in pairs
        if cosine >= _DUPLICATE
    ]
    if len(relations.labels) > 2 and pairs and _COMMON <= min(pairs)[0] < _DUPLICATE:
        found.append(
            f"all task vectors point the same way (every cosine is at least {min(pairs)[0]:.2f}): they may have "
            "another, later base in common than the one given; with it their differences would be the tasks' own"
        )
    return found


def _median(values: Sequence[float]) -> float:
    """The lower median, so that one of two unequal values is compared with the smaller."""
    return sorted(values)[(len(values) - 1) // 2]


def warnings_of_inputs(plan: Plan) -> list[str]:
    """What the files themselves tell: added tokens, tensors left out, adapters."""
    found = []
    for name in plan.rows:
        own = plan.base.spec(name).shape[0]
        counts = {model.label: model.spec(name).shape[0] for model in plan.models if model.has(name)}
        added = ", ".join(f"{count:,} in {label}" for label, count in counts.items() if count != own)
        found.append(
            f"'{name}' has {own:,} rows in the base and {added}: tokens were added; embeddings='base' merges the rows "
            "that the base has"
        )
    for model in plan.models:
        if names := plan.left_out(model):
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            found.append(f"{model.label}: the base has no {', '.join(names[:_NAMED])}{more}; a merge leaves them out")
    if all(map(_is_adapter, plan.models)) and len(plan.models) > 1:
        found.append(
            "all models are adapters: methods that look at matrices see few directions of each; KnOTS and CoreSpace "
            "merge such updates in a common basis, by any other method"
        )
    return found


def _is_adapter(model: Checkpoint) -> bool:
    return bool(model.deltas)


def suggest(relations: Relations) -> tuple[MergeMethod, str]:
    """A method with a scale to begin with, and why."""
    if len(relations.labels) == 1:
        return TaskArithmetic(1.0), "there is one model, and at scale 1 the result is that model"
    line, tables = best_line()
    gains = "; ".join(f"{table.gain(line):+.1f} points, “{table.title}”" for table in tables)
    return LINES[line](), (
        f"of the methods measured on several suites, {line} gained most over {REFERENCE} (docs/benchmarks: {gains}). "
        "The scale is its default; the tables chose theirs on validation data, so try smaller ones too"
    )
