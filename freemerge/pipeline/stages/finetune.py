"""The stage `finetune`: the base on each task, which gives the individual models."""

from __future__ import annotations

import copy

import torch

from freemerge.pipeline.context import Fit, RunContext
from freemerge.pipeline.ranks import is_first
from freemerge.training import (
    FineTuner,
)


def finetune(run: RunContext) -> None:
    """Fine-tune the base on each task: the individual models."""
    for task in run.suite.names:
        stage = run.files.finetune_stage(task)
        if run.done(stage):
            continue
        data = run.suite.for_task(task)
        tuner = run.files.base_tuner()
        resume = run.begin(stage)
        run.seed_stage(stage)
        tuner = tuner.for_task(data.task)
        fit = run.fit(stage, tuner, data, run.settings.finetune.trainer, resume, tuner.monitor, tuner.monitor_mode)
        if run.settings.finetune.weights == "best" and fit.best:
            tuner.load_state_dict(torch.load(fit.best, map_location="cpu", weights_only=True)["state_dict"])
        run.write(stage.path / "backbone.safetensors", tuner.weights())
        if tuner.head is not None and (head := tuner.head.state_dict()):
            run.write(stage.path / "head.safetensors", head)
        if is_first():
            tuner.save_adapter(stage.path / "adapter")
        run.finish(stage, {tuner.monitor: fit.value})
        _compare_with_base(run, task, tuner, fit)


def _compare_with_base(run: RunContext, task: str, tuner: FineTuner, fit: Fit) -> None:
    """Say so where fine-tuning has made a model worse, under the same head."""
    trainer = tuner.trainer
    if fit.value is None or getattr(trainer, "fast_dev_run", False) or trainer.limit_val_batches != 1.0:
        return
    loader = {task: run.suite.for_task(task).val_dataloader()}
    assert tuner.head is not None  # it has been fitted
    assert tuner.objective is not None
    base = run.measure.shared(run.files.base_weights(), {task: copy.deepcopy(tuner.head)}, loader)[task]
    metric = tuner.objective.metric
    if (fit.value < base) if metric.higher_is_better else (fit.value > base):
        run.doubt(
            f"finetune {task}: {tuner.monitor} is {fit.value:.3f}, worse than the base's {base:.3f} under the same "
            "head: a merge cannot gain from it; try a lower learning rate, fewer epochs or finetune.weights best"
        )
