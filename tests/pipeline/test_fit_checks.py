"""Trainer arguments and callbacks that would stop a fit after hours are refused before the first one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import (
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.cli import ReduceLROnPlateau

from freemerge.cli import main
from freemerge.pipeline import STAGES, ExpertsSettings, FinetuneSettings, PretrainSettings, RouterSettings, Settings
from freemerge.pipeline.checks import CheckError, check_run
from freemerge.pipeline.store.artifacts import Artifacts
from freemerge.pipeline.trainers import MakeTrainer
from freemerge.training import FineTuner
from tests.tiny import TinySuite, tiny_backbone

TINY = str(Path(__file__).parent.parent / "tiny.yaml")
TUNED = "train/loss, val/acc, val/loss"
EXPERTS = "train/agreement, train/features, train/logits, train/loss, val/agreement, val/features, val/logits, val/loss"


class LogsMore(FineTuner):
    """Logs a metric that it does not declare."""

    def on_validation_epoch_end(self) -> None:
        self.log("val/mine", 0.0)


class DeclaresMore(LogsMore):
    """Declares what it logs."""

    def logged(self, task) -> tuple[str, ...]:
        return (*super().logged(task), "val/mine")


class OwnHead(FineTuner):
    """Has heads of its own, and logs what every FineTuner logs."""

    def make_head(self, num_outputs: int):
        return super().make_head(num_outputs)


class Logger(Callback):
    """Logs a metric of its own."""

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("val/mine", 0.0)


def look(folder: Path, trainer: dict, settings: Settings | None = None, tuner: FineTuner | None = None) -> list[str]:
    """The doubts of the checks; a CheckError holds the faults."""
    files = Artifacts(tuner or FineTuner(tiny_backbone()), TinySuite(), folder, settings or Settings(), {}, seed=0)
    return check_run(files, STAGES, MakeTrainer({"accelerator": "cpu", "devices": 1, **trainer}))


def faults(*arguments, **options) -> list[str]:
    with pytest.raises(CheckError) as caught:
        look(*arguments, **options)
    return caught.value.faults


def stage_settings(stage: str, trainer: dict) -> Settings:
    kinds = {"pretrain": PretrainSettings, "finetune": FinetuneSettings, "experts": ExpertsSettings,
             "router": RouterSettings}  # fmt: skip
    return Settings(**{stage: kinds[stage](trainer=trainer)})


@pytest.mark.parametrize("callback", [EarlyStopping("val/acc", mode="max"), ModelCheckpoint(monitor="val/acc")])
def test_a_monitor_that_one_stage_does_not_log_names_the_stage_and_what_it_logs(callback, tmp_path) -> None:
    assert faults(tmp_path, {"callbacks": callback}) == [
        f"experts: {type(callback).__name__} in trainer.callbacks monitors 'val/acc', but this stage logs {EXPERTS}; "
        "monitor one of these; or set experts.trainer.callbacks, which replaces trainer.callbacks in this stage"
    ]
    settings = stage_settings("experts", {"callbacks": []})
    assert look(tmp_path, {"callbacks": callback}, settings) == []


@pytest.mark.parametrize(
    ("stage", "monitor", "logged"),
    [
        ("pretrain", "val/agreement", TUNED),
        ("finetune", "val/f1", TUNED),
        ("experts", "val/accuracy", EXPERTS),
        ("router", "val/agreement", "train/loss, val/acc, val/loss"),
    ],
)
def test_a_stages_own_callback_is_checked_against_its_stage(stage, monitor, logged, tmp_path) -> None:
    settings = stage_settings(stage, {"callbacks": [EarlyStopping("val/loss"), EarlyStopping(monitor)]})
    assert faults(tmp_path, {}, settings) == [
        f"{stage}: EarlyStopping in {stage}.trainer.callbacks monitors {monitor!r}, but this stage logs {logged}; "
        "monitor one of these"
    ]


def test_logged_monitors_pass(tmp_path) -> None:
    callbacks = [
        EarlyStopping("val/loss"),
        EarlyStopping("train/loss"),
        EarlyStopping("lr-AdamW"),
        LearningRateMonitor(),  # which adds it
        ModelCheckpoint(monitor="step", mode="max", save_top_k=2),
        ModelCheckpoint(monitor="val/loss", filename="mine"),
        ModelCheckpoint(monitor="val/nothing", save_top_k=0, filename="none"),  # never looks
    ]
    assert look(tmp_path, {"callbacks": callbacks}) == []
    assert look(tmp_path, {"callbacks": EarlyStopping("val/nothing"), "fast_dev_run": True}) == []  # it is off there


def test_without_validation_no_stage_logs_its_metrics(tmp_path) -> None:
    found = faults(tmp_path, {"callbacks": EarlyStopping("val/loss"), "limit_val_batches": 0})
    assert [each.partition(":")[0] for each in found] == ["pretrain", "finetune", "experts", "router"]
    assert "this stage logs train/loss; monitor" in found[1]
    assert look(tmp_path, {"callbacks": ModelCheckpoint(monitor="val/loss"), "limit_val_batches": 0}) == []


def test_metrics_that_user_defined_classes_may_log_are_doubts(tmp_path) -> None:
    settings = stage_settings("finetune", {"callbacks": [EarlyStopping("val/mine"), Logger()]})
    (doubt,) = look(tmp_path, {}, settings)
    assert doubt == (
        "finetune: EarlyStopping in finetune.trainer.callbacks monitors 'val/mine', but this stage logs "
        f"{TUNED}, unless Logger logs it"
    )
    settings = stage_settings("finetune", {"callbacks": [EarlyStopping("val/mine")]})
    (doubt,) = look(tmp_path, {}, settings, LogsMore(tiny_backbone()))
    assert doubt.endswith("unless LogsMore logs it")
    assert look(tmp_path, {}, settings, DeclaresMore(tiny_backbone())) == []
    assert len(faults(tmp_path, {}, settings, OwnHead(tiny_backbone(), head="linear"))) == 1
    lenient = stage_settings("finetune", {"callbacks": [EarlyStopping("val/mine", strict=False)]})
    (doubt,) = look(tmp_path, {}, lenient)
    assert doubt.endswith(f"this stage logs {TUNED}: it has no effect; monitor one of these")


def test_a_schedule_that_follows_a_metric_is_checked_and_follows_that_one(tmp_path) -> None:
    schedule = partial(ReduceLROnPlateau, monitor="val/acc")
    settings = Settings(experts=ExpertsSettings(schedule=schedule), router=RouterSettings(schedule=schedule))
    assert faults(tmp_path, {}, settings) == [
        f"experts: ReduceLROnPlateau in experts.schedule monitors 'val/acc', but this stage logs {EXPERTS}; monitor "
        "one of these"
    ]
    tuner = FineTuner(tiny_backbone(), num_classes=2, schedule=partial(ReduceLROnPlateau, monitor="val/agreement"))
    (fault,) = faults(tmp_path, {}, tuner=tuner)
    assert fault.startswith("finetune: ReduceLROnPlateau in model.schedule monitors 'val/agreement'")
    assert tuner.configure_optimizers()["lr_scheduler"]["monitor"] == "val/agreement"
    plain = FineTuner(tiny_backbone(), num_classes=2, schedule=torch.optim.lr_scheduler.ReduceLROnPlateau)
    assert plain.configure_optimizers()["lr_scheduler"]["monitor"] == "val/loss"
    assert look(tmp_path, {}, tuner=plain) == []


@pytest.mark.parametrize("callback", [LearningRateMonitor(), DeviceStatsMonitor()])
@pytest.mark.parametrize("logger", [False, [], [False]])
def test_a_callback_that_needs_a_logger(callback, logger, tmp_path) -> None:
    name = type(callback).__name__
    settings = stage_settings("router", {"callbacks": [callback], "logger": logger})
    assert faults(tmp_path, {}, settings) == [
        f"router: {name} in router.trainer.callbacks needs a logger, and the stage has none; remove the callback, or "
        "set router.trainer.logger to true"
    ]
    assert len(faults(tmp_path, {"callbacks": [callback], "logger": logger})) == 4
    with_logger = stage_settings("router", {"callbacks": [callback], "logger": True})
    assert look(tmp_path, {"logger": logger}, with_logger) == []


def test_arguments_that_lightning_refuses_are_found_for_each_stage(tmp_path) -> None:
    settings = stage_settings("experts", {"enable_checkpointing": False, "callbacks": [ModelCheckpoint()]})
    (fault,) = faults(tmp_path, {}, settings)
    assert fault.startswith("experts.trainer: Lightning's Trainer refuses the arguments of this stage: ")
    assert "enable_checkpointing=False" in fault
    (fault,) = faults(tmp_path, {}, stage_settings("router", {"precision": "17-mixed"}))
    assert fault.startswith("router.trainer: ")
    assert "17-mixed" in fault


def test_the_command_line_reports_the_fault_before_it_writes_anything(tmp_path, capsys) -> None:
    overlay = tmp_path / "overlay.yaml"
    callbacks = [{"class_path": "EarlyStopping", "init_args": {"monitor": "val/acc"}}]
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    folder = tmp_path / "run"
    assert main(["fit", "--config", TINY, "--config", str(overlay), "--run.folder", str(folder)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: experts: EarlyStopping in trainer.callbacks monitors 'val/acc', but this stage logs")
    made = {path.name for path in folder.rglob("*")} if folder.exists() else set()
    assert not made & {"pretrain", "finetune", "stage.json"}
