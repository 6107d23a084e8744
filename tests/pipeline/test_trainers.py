"""Callbacks and loggers as Lightning's users write them, in a run of many fits."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, ModelSummary
from lightning.pytorch.loggers import CSVLogger

from freemerge import FineTuner, SuiteRun
from freemerge.checkpoints import load_checkpoint
from freemerge.cli import main
from freemerge.models import TransformersBackbone
from freemerge.pipeline.loggers import make_loggers
from freemerge.pipeline.settings import FinetuneSettings
from freemerge.pipeline.trainers import MakeTrainer, best_of
from freemerge.training import BestCheckpoint, ExpertTrainer, RouterTrainer
from tests.tiny import TinySuite, tiny_backbone

TINY = str(Path(__file__).parent.parent / "tiny.yaml")
QUIET = {"accelerator": "cpu", "enable_progress_bar": False}


def fit(folder: Path, overlay: dict, *options: str) -> int:
    path = folder.parent / "overlay.yaml"
    path.write_text(yaml.safe_dump(overlay))
    return main(["fit", "--config", TINY, "--config", str(path), "--run.folder", str(folder), *options])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Where a run has been, with callbacks and loggers of all fits and of one stage."""
    place = tmp_path_factory.mktemp("place")
    diary = {"class_path": "tests.pipeline.own_callback.Diary", "init_args": {"path": str(place / "diary")}}
    keeper = {"monitor": "val/loss", "filename": "mine", "dirpath": str(place / "kept")}
    csv_logger = {"save_dir": str(place / "csv")}
    overlay = {
        "trainer": {
            "callbacks": [diary],
            "logger": [
                {"class_path": "CSVLogger", "init_args": csv_logger},
                {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {**csv_logger, "name": "mine"}},
            ],
        },
        "finetune": {"weights": "best", "trainer": {"max_epochs": 3, "callbacks": [
            diary,
            {"class_path": "ModelCheckpoint", "init_args": keeper},
            {"class_path": "LearningRateMonitor"},
            {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 0, "min_delta": 1e9}},
        ]}},
    }  # fmt: skip
    assert fit(place / "run", overlay) == 0
    return place


def test_every_fit_has_callbacks_of_its_own(place) -> None:
    tuned = ["FineTuner 0 1 ModelCheckpoint", "FineTuner 1 2 ModelCheckpoint"]  # and early stopping ends it: each anew
    trained = [f"{name} {epoch} {epoch + 1} BestCheckpoint" for name in ("ExpertTrainer",) * 2 + ("RouterTrainer",)
               for epoch in range(2)]  # fmt: skip
    pretrained = [f"FineTuner {epoch} {epoch + 1} BestCheckpoint" for epoch in range(2)]
    assert (place / "diary").read_text().splitlines() == pretrained + tuned * 2 + trained


def test_every_fit_is_a_run_of_its_own_in_every_logger(place) -> None:
    for root in (place / "csv", place / "csv" / "mine"):
        for name in ("pretrain", "finetune/corners", "finetune/bars", "experts/corners", "experts/bars", "router"):
            assert [path.name for path in (root / name).iterdir()] == ["version_0"]
    rows = list(csv.DictReader((place / "csv/finetune/bars/version_0/metrics.csv").open()))
    assert any(row["lr-AdamW"] for row in rows)


def test_the_best_weights_are_those_of_the_users_own_checkpoint(place) -> None:
    for task in ("corners", "bars"):
        state = torch.load(place / "kept" / "finetune" / task / "mine.ckpt", weights_only=True)["state_dict"]
        kept = load_checkpoint(place / "run" / "finetune" / task / "backbone.safetensors")
        assert all(torch.equal(state[f"backbone.model.{name}"], tensor) for name, tensor in kept.items())


def test_loggers_see_the_configuration(place) -> None:
    hparams = {
        name: yaml.safe_load((place / "csv" / name / "version_0" / "hparams.yaml").read_text())
        for name in ("finetune/bars", "experts/bars", "router")
    }
    tuned = hparams["finetune/bars"]
    assert (tuned["stage"], tuned["task"], tuned["seed"]) == ("finetune bars", "bars", 0)
    assert tuned["head"] == "probe"  # a hyperparameter of the module
    assert tuned["model"]["optimizer"]["class"] == "torch.optim.adamw.AdamW"
    assert tuned["model"]["optimizer"]["lr"] == 3e-3
    assert tuned["model"]["backbone"]["class"].endswith("TransformersBackbone")
    assert hparams["experts/bars"]["free"] == "FR"
    assert hparams["experts/bars"]["experts"]["density"] == 0.05
    assert hparams["experts/bars"]["temperature"] == 2.0
    assert hparams["router"]["router"]["kind"] == "conv"


def test_a_checkpoint_of_a_fit_is_loaded_with_its_hyperparameters(place) -> None:
    config = yaml.safe_load(Path(TINY).read_text())["model"]["init_args"]["backbone"]["init_args"]["config"]
    backbone = TransformersBackbone(config=config, pooling="mean")
    tuner = FineTuner.load_from_checkpoint(place / "kept/finetune/bars/mine.ckpt", backbone=backbone)
    assert tuner.hparams["label_smoothing"] == 0.0
    kept = load_checkpoint(place / "run/finetune/bars/backbone.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in tuner.weights().items())


def test_modules_log_the_metrics_that_they_declare(place) -> None:
    """The checks before a run find monitors that no fit logs by these declarations."""
    tuned = set(FineTuner(tiny_backbone()).logged(2))
    declared = {"pretrain": tuned, "finetune/bars": tuned, "experts/bars": ExpertTrainer.LOGGED,
                "router": RouterTrainer.LOGGED}  # fmt: skip
    for name, metrics in declared.items():
        with (place / "csv" / name / "version_0" / "metrics.csv").open() as file:
            columns = csv.DictReader(file).fieldnames
        assert {column for column in columns if "/" in column} == set(metrics)
    for kind in (ExpertTrainer, RouterTrainer):
        assert kind.monitor in kind.LOGGED


def test_a_wrong_stage_trainer_is_one_line_before_anything_runs(tmp_path, capsys) -> None:
    for trainer, part in (
        ({"max_epochs": "many"}, "finetune.trainer"),
        ({"callbacks": [{"class_path": "EarlyStoppin"}]}, "EarlyStoppin"),
        ({"callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitr": "x"}}]}, "monitr"),
        ({"logger": {"class_path": "CSVLoger"}}, "CSVLoger"),
    ):
        with pytest.raises(SystemExit) as stop:
            raise SystemExit(fit(tmp_path / "run", {"finetune": {"trainer": trainer}}))
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert part in line
        assert not (tmp_path / "run").exists()


def test_a_model_checkpoint_without_a_monitor_stands_beside_the_best_one(tmp_path) -> None:
    make = MakeTrainer({**QUIET, "callbacks": [ModelCheckpoint(every_n_epochs=1)], "logger": False})
    best = BestCheckpoint(dirpath=tmp_path, monitor="val/acc")
    trainer = make(tmp_path / "router", "router", {}, [best])
    assert best in trainer.checkpoint_callbacks
    assert [each.dirpath for each in trainer.checkpoint_callbacks if each is not best] == [
        str(tmp_path / "router" / "checkpoints" / "own")
    ]
    assert best_of(trainer) == best.best_model_path == ""


def test_arguments_are_copied_and_the_model_is_summarized_once(tmp_path) -> None:
    stopping = EarlyStopping("val/acc")
    make = MakeTrainer({**QUIET, "callbacks": stopping, "logger": False})
    trainers = [make(tmp_path, name, {"callbacks": [stopping]}, []) for name in ("a", "b")]
    own = [next(each for each in trainer.callbacks if isinstance(each, EarlyStopping)) for trainer in trainers]
    assert len({id(each) for each in [stopping, *own]}) == 3
    assert [any(isinstance(each, ModelSummary) for each in trainer.callbacks) for trainer in trainers] == [True, False]
    always = MakeTrainer({**QUIET, "enable_model_summary": True, "logger": False})
    for name in ("a", "b"):
        assert any(isinstance(each, ModelSummary) for each in always(tmp_path, name, {}, []).callbacks)
    own_summary = MakeTrainer({**QUIET, "callbacks": [ModelSummary(max_depth=2)], "logger": False})
    for name in ("a", "b"):
        found = [each for each in own_summary(tmp_path, name, {}, []).callbacks if isinstance(each, ModelSummary)]
        assert [each._max_depth for each in found] == [2]


def test_loggers_of_python(tmp_path) -> None:
    (made,) = make_loggers(lambda name: CSVLogger(tmp_path, name=name), tmp_path, "experts/birds")
    assert made.name == "experts/birds"
    mine = CSVLogger(tmp_path, name="mine")
    (copied,) = make_loggers(mine, tmp_path, "router")
    assert copied is not mine
    assert copied.name == "mine"
    for nothing in (None, True):
        (default,) = make_loggers(nothing, tmp_path / "router", "router")
        assert Path(default.log_dir) == tmp_path / "router" / "logs" / "version_0"
    assert make_loggers(False, tmp_path, "router") is False
    assert len(make_loggers([True, {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path)}}],
                            tmp_path, "router")) == 2  # fmt: skip


def test_a_stages_callbacks_need_no_dicts_in_python() -> None:
    monitor = LearningRateMonitor()
    assert FinetuneSettings(trainer={"callbacks": [monitor]}).trainer["callbacks"] == [monitor]
    with pytest.raises(ValueError, match=r"finetune\.trainer\.logger: no logger of Lightning's: .*Nothing"):
        FinetuneSettings(trainer={"logger": {"class_path": "Nothing"}})


class DtypeHead(torch.nn.Linear):
    """A head that remembers the dtype of the products that it computed."""

    seen: ClassVar[set[torch.dtype]] = set()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        logits = super().forward(features)
        self.seen.add(logits.dtype)
        return logits.float()


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_a_run_evaluates_in_the_precision_of_its_trainer(tmp_path, precision: str, dtype: torch.dtype) -> None:
    run = SuiteRun(
        FineTuner(tiny_backbone()), TinySuite(), tmp_path, trainer={"accelerator": "cpu", "precision": precision}
    )
    head = DtypeHead(run.tuner.backbone.feature_dim, run.suite.task("bars").num_classes)
    DtypeHead.seen.clear()
    loaders = {"bars": run.measure.loaders("test")["bars"]}
    scores = run.measure.shared(run.tuner.backbone.model.state_dict(), {"bars": head}, loaders)
    assert DtypeHead.seen == {dtype}
    assert 0.0 <= scores["bars"] <= 1.0
