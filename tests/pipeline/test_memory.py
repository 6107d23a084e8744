"""Merging and the extraction of experts hold one fine-tuned model at a time, whatever the number of tasks."""

import gc
import weakref
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from freemerge import FineTuner, SuiteRun
from freemerge.merging import FRMerging, task_vector
from freemerge.pipeline import MergeSettings, Settings
from freemerge.pipeline.store import artifacts
from tests.tiny import TinySuite, tiny_backbone


def test_one_fine_tuned_model_is_in_memory_at_a_time(tmp_path: Path, monkeypatch) -> None:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "max_steps": 1}
    tuner = FineTuner(tiny_backbone(), optimizer=partial(torch.optim.AdamW, lr=3e-3))
    tuner.backbone.pretrained = True
    settings = Settings(merge=MergeSettings({"FR": FRMerging()}, scales=[0.3, 1.0]))
    run = SuiteRun(tuner, TinySuite(), tmp_path, trainer=quiet, settings=settings)
    run.run(["finetune"])
    models: list[weakref.ref] = []
    load = artifacts.load_checkpoint

    def watched(path: Path) -> dict[str, torch.Tensor]:
        found = load(path)
        if Path(path).parent.parent.name == "finetune" and Path(path).name == "backbone.safetensors":
            models.append(weakref.ref(next(iter(found.values()))))
        return found

    def alive() -> int:
        gc.collect()
        return sum(model() is not None for model in models)

    counts: list[int] = []

    def counted(*models: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        counts.append(alive())
        return task_vector(*models)

    monkeypatch.setattr(artifacts, "load_checkpoint", watched)
    monkeypatch.setattr(import_module("freemerge.pipeline.stages.experts"), "task_vector", counted)
    run.run(["merge"])
    assert alive() == 0
    assert len(models) == 2  # each was evaluated; the merge itself reads them tensor by tensor
    run.run(["experts"])
    assert counts == [1, 1]
