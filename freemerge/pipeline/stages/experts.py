"""The stage `experts`: extract experts from the residuals, then train them against the fine-tuned models."""

from __future__ import annotations

from functools import partial

from freemerge.checkpoints import hash_tensors
from freemerge.errors import NotFiniteError
from freemerge.experts import load_expert, save_expert
from freemerge.merging import task_vector
from freemerge.models import FreeModel
from freemerge.pipeline.context import RunContext
from freemerge.pipeline.ranks import is_first
from freemerge.pipeline.store.stage_folder import StageFolder
from freemerge.training import (
    ExpertTrainer,
)


def experts(run: RunContext) -> None:
    """Extract each task's expert from its residual, then train it against its fine-tuned model, the teacher."""
    extraction = run.files.extraction_stage()
    if not run.done(extraction):
        _extract_experts(run, extraction)
    for task in run.suite.names:
        stage = run.files.expert_stage(task)
        if run.done(stage):
            continue
        settings = run.settings.experts
        merged = run.files.free_weights()
        start = load_expert(run.files.extracted_path(task), merged)
        head, teacher = run.files.heads()[task], run.files.finetuned(task)
        resume = run.begin(stage)
        run.seed_stage(stage)
        trainer_module = ExpertTrainer(
            run.files.backbone(merged),
            head,
            teacher,
            start,
            **settings.training,
        )
        data = run.suite.for_task(task, batch_size=settings.batch_size)
        fit = run.fit(stage, trainer_module, data, settings.trainer, resume, trainer_module.monitor)
        if is_first():
            save_expert(run.files.expert_path(task), trainer_module.expert, settings.values)
        run.finish(stage, {trainer_module.monitor: fit.value})


def _extract_experts(run: RunContext, stage: StageFolder) -> None:
    settings = run.settings.experts
    merged, heads = run.files.free_weights(), run.files.heads()
    run.begin(stage)
    hashes = {"base_hash": hash_tensors(run.files.base_weights()), "merged_hash": hash_tensors(merged)}
    experts = {  # one fine-tuned model in memory at a time
        task: settings.cut(task_vector(merged, run.files.finetuned(task)), {"task": task, **hashes})
        for task in run.suite.names
    }
    loaders = run.measure.loaders("val")
    search, scales = [], run.settings.merge.scales or [1.0]
    for scale in run.with_bar(scales, "experts: extracted"):
        scaled = {task: expert.scaled(scale) for task, expert in experts.items()}
        model = FreeModel(run.files.backbone(merged), heads, scaled)
        if (score := run.mean_score(partial(run.measure.free, model, loaders, told="task"))) is None:
            run.doubt(f"experts at scale {scale:g} compute NaN or infinite values, and are left out")
            continue
        search.append({"scale": scale, "mean_acc": score})
    if not search:
        raise NotFiniteError(f"experts compute NaN or infinite values at every scale: {scales}")
    best = max(search, key=lambda candidate: candidate["mean_acc"])
    if is_first():
        for task, expert in experts.items():
            save_expert(run.files.extracted_path(task), expert.scaled(best["scale"]), settings.values)
    run.finish(stage, {"search": search, "best": best})
    run.say(f"experts: extracted, scale {best['scale']:g}", best["mean_acc"])
