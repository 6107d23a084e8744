"""The stage `pretrain`: fit the backbone on the suite's pretraining data, and keep it as the base."""

from __future__ import annotations

import copy

import torch.distributed as dist

from freemerge.checkpoints import expand
from freemerge.pipeline.context import RunContext
from freemerge.pipeline.ranks import is_first
from freemerge.pipeline.store.cache import find, store
from freemerge.pipeline.store.stage_folder import StageFolder, content, copy_file
from freemerge.runtime.process_group import in_process_group
from freemerge.training import (
    FineTuner,
)


def pretrain(run: RunContext) -> None:
    """Fit the backbone on the suite's pretraining data, and keep it as the base."""
    if not run.files.pretrains:
        return
    stage = run.files.pretrain_stage()
    done = run.done(stage)
    made, own = stage.path / "base.safetensors", run.folder / "base.safetensors"
    if done and own.is_file() and content(own) != content(made):
        raise ValueError(
            f"{own}: is not the base that was pretrained here, {made}: leave pretrain out of run.stages to go on "
            "from it, or remove it"
        )
    if not done and not _pretrained_before(run, stage):
        _pretrain(run, stage)
    if is_first() and not (done and own.is_file()):
        copy_file(made, own)
    if in_process_group():
        dist.barrier()  # no rank may read the file before it exists


def _pretrain(run: RunContext, stage: StageFolder) -> None:
    resume = run.begin(stage)
    settings = run.settings.pretrain
    data = run.suite.pretraining_data(batch_size=settings.batch_size)
    run.seed_stage(stage)
    tuner = FineTuner(copy.deepcopy(run.tuner.backbone), data.num_classes, head="linear", **settings.optimization)
    fit = run.fit(stage, tuner, data, settings.trainer, resume, tuner.monitor, tuner.monitor_mode)
    run.write(stage.path / "base.safetensors", tuner.backbone.weights())
    run.finish(stage, {tuner.monitor: fit.value})
    if run.settings.pretrain.cache is not None and is_first():
        store(stage, expand(run.settings.pretrain.cache))


def _pretrained_before(run: RunContext, stage: StageFolder) -> bool:
    """Take the base from the cache of pretrained backbones, if it is there."""
    if run.settings.pretrain.cache is None or stage.begun() == stage.key:
        return False
    kept = find(stage, expand(run.settings.pretrain.cache))
    if kept is None:
        return False
    run.begin(stage)
    if is_first():
        copy_file(kept.path / "base.safetensors", stage.path / "base.safetensors")
    record = kept.finished()
    assert record is not None  # `find` returns only finished stages
    stage.finish(record["results"])
    run.console.print(f"{stage.name}: taken from {kept.path}", markup=False)
    return True
