"""Checks of the chosen stages and their settings that need no data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial

from freemerge.checkpoints import CheckpointError, locate
from freemerge.experts import matrix_shape
from freemerge.merging import (
    AdaMerging,
    MeasuredMethod,
    MergeError,
    WeightAverage,
    has_scale,
    plan_merge,
    rescaled,
)
from freemerge.pipeline.checks.findings import Findings
from freemerge.pipeline.stages.tune import chosen_method
from freemerge.pipeline.store.artifacts import Artifacts
from freemerge.pipeline.store.replacing import difference, is_extension
from freemerge.pipeline.store.stage_folder import StageFolder
from freemerge.tuning import Space


def check_stages(files: Artifacts, stages: Sequence[str], findings: Findings) -> None:
    """Check that everything a stage reads exists, or is made by an earlier one of the chosen stages."""
    base = ["pretrain"] if files.pretrains and not files.base_path.is_file() else []
    needs = {
        "finetune": base,
        "merge": [*base, "finetune"],
        "experts": [*base, "finetune", "merge"],
        "router": ["merge"] if files.settings.router.kind == "early" else [],
        "evaluate": [*base, "finetune", "merge"],
    }
    if "experts" in stages:  # with experts, `evaluate` measures the FREE model, which needs its router
        needs["evaluate"] += ["router"]
    missing: dict[str, list[str]] = {}
    for stage in stages:
        for need in needs.get(stage, []):
            if need not in stages and _is_missing(files, need):
                missing.setdefault(need, []).append(stage)
    for need, by in missing.items():
        findings.fault(
            f"{files.folder}: stage {need!r} has not been done with this configuration; add {need} to run.stages, as "
            f"{' and '.join(by)} need{'s' * (len(by) == 1)} it"
        )


def _is_missing(files: Artifacts, stage: str) -> bool:
    folders: dict[str, list[Callable[[], StageFolder]]] = {
        "pretrain": [files.pretrain_stage] if files.pretrains else [],
        "finetune": [partial(files.finetune_stage, task) for task in files.suite.names],
        "merge": [files.merge_stage],
        "router": [files.router_stage],
    }
    return any(_cannot_be_there(make()) for make in folders[stage])


def _cannot_be_there(folder: StageFolder) -> bool:
    """Whether a stage's result is missing, and would still be missing after the stages before it have run again."""
    finished = folder.finished()
    if finished is None:
        return True
    if finished["key"] == folder.key:
        return False
    unknown_yet = difference(finished, folder.inputs) is None and not is_extension(finished["inputs"], folder.inputs)
    return not unknown_yet


def check_finished_models(files: Artifacts, findings: Findings) -> None:
    """Check that the finished models belong to this suite's tasks and to this base; only names and shapes are read."""
    settings = files.settings.finetune
    if not settings.models:
        return
    if files.tuner.peft is not None:
        findings.fault("finetune.models: a finished adapter is given as a model; leave model.peft out")
    if files.tuner.heads.is_trained:
        findings.fault(
            "finetune.models: finished models need a head that is made from the base; set model.head to probe"
        )
    if files.pretrains:
        findings.fault("finetune.models: finished models need the base that they were made from as model.backbone")
        return
    for task, source in settings.models.items():
        if task not in files.suite.names:
            if task in (known := files.suite.available()):
                continue  # of a task that is not selected now
            near = get_close_matches(task, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"tasks: {', '.join(known)}"
            findings.fault(f"finetune.models: there is no task {task!r}; {hint}")
            continue
        try:
            plan_merge(files.base_weights(), [locate(source)], WeightAverage(), exclude=settings.exclude)
        except (CheckpointError, MergeError) as error:
            findings.fault(f"finetune.models, {task}: {error}")


def check_merge(files: Artifacts, findings: Findings) -> None:
    """Check that the methods' parameters suit the tasks, and that each method writes a file of its own."""
    settings, tasks = files.settings.merge, files.suite.names
    paths: dict[str, str] = {}
    for name, method in settings.lines.items():
        path = files.merged_path(name)
        if path.parent != files.folder / "merge":
            findings.fault(f"merge.methods: {name!r} would be a file outside of {files.folder / 'merge'}; rename it")
        if (other := paths.setdefault(str(path), name)) != name:
            findings.fault(f"merge.methods: {other!r} and {name!r} would both be {path.name}; rename one of them")
        try:
            asked: dict[str, MeasuredMethod] = {}
            files.with_statistics(method, asked).check(tasks)
            for task in tasks if any(isinstance(each, AdaMerging) for each in asked.values()) else ():
                if (kind := files.suite.task(task).kind) != "classification":
                    findings.fault(f"merge.methods: {name}: AdaMerging learns from classes, and {task!r} is {kind}")
            for scale in settings.scales_of(method) if has_scale(method) else ():
                rescaled(method, scale)
        except ValueError as error:
            findings.fault(f"merge.methods: {name}: {error}")


def check_router_settings(files: Artifacts, findings: Findings) -> None:
    """Check that `top_n` is not larger than the number of tasks."""
    most, wanted = len(files.suite.names), files.settings.router.top_n
    if wanted > most:
        tasks = "there is one task" if most == 1 else f"there are {most} tasks"
        findings.fault(f"router.top_n: {wanted} experts cannot be mixed where {tasks}; set it to {most} or less")


def check_experts_settings(files: Artifacts, findings: Findings) -> None:
    """Check that the density is large enough for a low-rank expert to hold at least one direction."""
    settings, weights = files.settings.experts, files.tuner.backbone.weights()
    shapes = [tuple(each.shape) for each in weights.values() if each.is_floating_point() and each.numel()]
    if not shapes:
        findings.fault("experts: the backbone has no floating-point weights to make an expert of")
    if not shapes or settings.kind != "low_rank":
        return
    total = sum(math.prod(shape) for shape in shapes)
    budget = max(1, round(settings.density * total))
    direction = min((sum(matrix_shape(shape)) for shape in shapes if len(shape) > 1), default=math.inf)
    vector = min((math.prod(shape) for shape in shapes if len(shape) < 2), default=math.inf)
    vector = math.inf if settings.vectors == "none" else 2 * vector  # within half the budget
    if (least := min(direction, vector)) == math.inf:
        findings.fault("experts.kind: low_rank needs weights that are matrices, and the backbone has none; use sparse")
    elif budget < least:
        findings.fault(
            f"experts.density: {settings.density:g} of {total} weights is {budget}, and the smallest part of an expert "
            f"takes {least}: the experts would hold nothing; set it to {least / total:.2g} or more"
        )


def check_tune(files: Artifacts, findings: Findings) -> None:
    """Check the settings of a later `tune` command, if the configuration has any."""
    if files.settings.tune.line is None and files.settings.tune.method is None and files.settings.tune.space is None:
        return
    try:
        _, method = chosen_method(files.settings)
        if files.settings.tune.space is not None:
            Space(method, files.suite.names, files.settings.tune.space)
    except ValueError as error:
        findings.fault(error)
