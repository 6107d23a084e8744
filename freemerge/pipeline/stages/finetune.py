"""The stage `finetune`: fine-tune the base on each task, or take finished models, as the individual models."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from freemerge.pipeline.context import Fit, RunContext
from freemerge.pipeline.ranks import is_first
from freemerge.pipeline.store.stage_folder import StageFolder
from freemerge.training import FineTuner


def finetune(run: RunContext) -> None:
    """Make each task's individual model: fine-tune the base, unless a finished model is given."""
    for task in run.suite.names:
        stage = run.files.finetune_stage(task)
        if run.done(stage):
            continue
        data = run.suite.for_task(task)
        tuner = run.files.base_tuner()
        resume = run.begin(stage)
        run.seed_stage(stage)
        tuner = tuner.for_task(data.task)
        if task in run.settings.finetune.models:
            value: float | None = _take(run, task, stage, tuner, data, resume)
            whole, advice = True, "is it a model of this task, with these classes in this order?"
        else:
            fit = _fit(run, stage, tuner, data, resume)
            value, whole = fit.value, fit.whole
            advice = "try a lower learning rate, fewer epochs or finetune.weights best"
        run.write(stage.path / "backbone.safetensors", tuner.weights())
        if tuner.head is not None and (head := tuner.head.state_dict()):
            run.write(stage.path / "head.safetensors", head)
        if is_first():
            tuner.save_adapter(stage.path / "adapter")
        run.finish(stage, {tuner.monitor: value})
        if value is not None and whole:
            _compare_with_base(run, task, tuner, value, advice)


def _fit(
    run: RunContext, stage: StageFolder, tuner: FineTuner, data: L.LightningDataModule, resume: Path | None
) -> Fit:
    """Fine-tune the base on a task."""
    fit = run.fit(stage, tuner, data, run.settings.finetune.trainer, resume, tuner.monitor, tuner.monitor_mode)
    if run.settings.finetune.weights == "best" and fit.best:
        tuner.load_state_dict(torch.load(fit.best, map_location="cpu", weights_only=True)["state_dict"])
    return fit


def _take(
    run: RunContext,
    task: str,
    stage: StageFolder,
    tuner: FineTuner,
    data: L.LightningDataModule,
    resume: Path | None,
) -> float:
    """Take a finished model, with a head that is made from the base; returns the monitored metric."""
    if not tuner.head_ready:  # it is fitted before the first step; the weights after that step are not used
        settings = {**run.settings.finetune.trainer, "max_steps": 1, "limit_val_batches": 0, "callbacks": []}
        run.fit(stage, tuner, data, settings, resume, tuner.monitor, tuner.monitor_mode)
    tuner.backbone.load_weights(run.files.finished_model(task))
    return _measure(run, task, tuner, tuner.weights())


def _measure(run: RunContext, task: str, tuner: FineTuner, weights: Mapping[str, Tensor]) -> float:
    """The validation metric of weights under the head of a task."""
    assert tuner.head is not None  # it has been made
    loader = {task: run.suite.for_task(task).val_dataloader()}
    return run.measure.shared(weights, {task: copy.deepcopy(tuner.head)}, loader)[task]


def _compare_with_base(run: RunContext, task: str, tuner: FineTuner, value: float, advice: str) -> None:
    """Print a note if a fine-tuned model is worse than the base with the same head."""
    assert tuner.objective is not None
    base = _measure(run, task, tuner, run.files.base_weights())
    metric = tuner.objective.metric
    if (value < base) if metric.higher_is_better else (value > base):
        run.doubt(
            f"finetune {task}: {tuner.monitor} is {value:.3f}, worse than the base's {base:.3f} under the same head: a "
            f"merge cannot gain from it; {advice}"
        )
