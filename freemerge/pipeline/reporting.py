"""The report of a run: all its models, evaluated on all tasks' test data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

import freemerge
from freemerge.checkpoints import load_checkpoint
from freemerge.evaluation import Report, Routing, Row
from freemerge.experts import load_expert
from freemerge.models import FreeModel, LanguageBackbone
from freemerge.pipeline.measure import Measure
from freemerge.pipeline.stages.held_out import held_out_heads
from freemerge.pipeline.store.artifacts import Artifacts
from freemerge.training import FineTuner


def make_report(files: Artifacts, measure: Measure, model: FreeModel | None) -> Report:
    """Evaluate all models of a run, and make the report.

    Args:
        files: the run's files.
        measure: evaluates the models.
        model: the finished FREE model; None if there are no experts, so that the report ends with the merged models.

    Raises:
        ValueError: a stage that the report needs is not finished.
    """
    suite = files.suite
    merge_record = files.require(files.merge_stage())["results"]
    loaders = measure.loaders("test")
    held_out = {task: suite.for_task(task).test_dataloader() for task in suite.held_out}
    heads = files.heads() | held_out_heads(files, measure.device)
    size = _size(files.merged_path(files.settings.merge.free))

    def row(name: str, weights: dict[str, Tensor], chosen: Mapping[str, Any] | None = None) -> Row:
        scores = measure.shared(weights, heads, loaders | held_out)
        apart = {task: scores.pop(task) for task in held_out}
        return Row(name, scores, 0, dict(chosen or {}), held_out=apart)

    rows = [
        row(base_name(files.tuner), files.base_weights()),
        Row("individual", measure.individual(loaders), (len(suite.names) - 1) * size),
    ]
    for name in files.settings.merge.lines:
        rows.append(row(name, load_checkpoint(files.merged_path(name)), merge_record["methods"][name]["best"]))
    search = {name: entry["search"] for name, entry in merge_record["methods"].items()}
    settings = _provenance(files, size)
    if model is not None:
        extraction = files.require(files.extraction_stage())["results"]
        search["FREE extracted"] = extraction["search"]
        routing = measure.routing(model, loaders)
        settings |= {"threshold": model.threshold, "routing": routing.as_dict()}
        rows += _free_rows(files, measure, model, routing, extraction["best"], loaders)
    return Report(
        title=f"{title(measure)}, {len(suite.names)} tasks, seed {files.seed}",
        rows=rows,
        search=search,
        settings=settings,
        metrics=measure.metrics,
    )


def doubts_of(report: Report, free: str) -> list[str]:
    """Notes on a report: whether the experts do not help.

    Args:
        report: the report, with or without experts.
        free: name of the row of the merged backbone that carries the experts.

    Returns:
        The notes, one line each.
    """
    named = {row.name: row for row in report.rows}
    trained, merged = named.get("FREE trained (oracle)"), named[free]
    if trained is None or report.average(trained) > report.average(merged):
        return []
    return [
        f"experts do not help: on average {100 * report.average(trained):.1f} with them, "
        f"{100 * report.average(merged):.1f} for the merged {free} alone; raise experts.density, or train them longer"
    ]


def base_name(tuner: FineTuner) -> str:
    """The name of the base's row in a report, with the kind of heads that it is evaluated with."""
    if isinstance(tuner.backbone, LanguageBackbone):
        return "base (zero-shot)"
    heads = {"probe": "probe", "zero_shot": "zero-shot", "prototypes": "prototypes", "linear": "fine-tuned heads"}
    return f"base ({heads[tuner.heads.kind]})"


def title(measure: Measure) -> str:
    """The title of a report on the suite's test data."""
    accuracies = set(measure.metrics.values()) == {"accuracy"}
    return f"{type(measure.suite).__name__}: test {'accuracy' if accuracies else 'scores'} (%)"


def _free_rows(
    files: Artifacts,
    measure: Measure,
    model: FreeModel,
    routing: Routing,
    chosen: Mapping[str, Any],
    loaders: Mapping[str, Any],
) -> list[Row]:
    tasks = files.suite.names
    merged = files.free_weights()
    extracted = {task: load_expert(files.extracted_path(task), merged) for task in tasks}
    untrained = FreeModel(files.backbone(merged), files.heads(), extracted)
    extracted_bytes = sum(_size(files.extracted_path(task)) for task in tasks)
    expert_bytes = sum(_size(files.expert_path(task)) for task in tasks)
    router_bytes = _size(files.router_stage().path / "router.safetensors")
    return [
        Row(
            "FREE extracted (oracle)",
            measure.free(untrained, loaders, told="task"),
            extracted_bytes,
            chosen=dict(chosen),
        ),
        Row("FREE trained (routed)", measure.free(model, loaders, told="nothing"), expert_bytes + router_bytes),
        Row("FREE trained (oracle)", measure.free(model, loaders, told="task"), expert_bytes),
        Row("router accuracy", routing.accuracy, router_bytes, kind="router"),
    ]


def _provenance(files: Artifacts, backbone_bytes: int) -> dict[str, Any]:
    return {
        "seed": files.seed,
        "suite": files.suite.identity(),
        "split": {"chosen_on": "val", "reported_on": "test"},
        "backbone_bytes": backbone_bytes,
        "density": files.settings.experts.extraction.get("density"),
        "free_on": files.settings.merge.free,
        "versions": {"freemerge": freemerge.__version__, "torch": torch.__version__, "lightning": L.__version__},
    }


def _size(path: Path) -> int:
    return path.stat().st_size
