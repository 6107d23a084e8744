"""A run from Python: what the command line has done is done already, and the other way round."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping

from freemerge import FineTuner, FreeModel, SuiteRun
from freemerge.cli import main
from freemerge.merging import FRMerging, TaskArithmetic
from freemerge.models import ModuleBackbone, TransformersBackbone
from freemerge.pipeline import ExpertsSettings, MergeSettings, RouterSettings, Settings
from freemerge.pipeline.dependencies import dependencies, plain
from tests.tiny import TinySuite

TINY = Path(__file__).parent.parent / "tiny.yaml"
METHODS = {
    "FR": {"class_path": "FRMerging", "init_args": {"scale": 0.5}},
    "task arithmetic": {"class_path": "TaskArithmetic"},
}
STAGES = [
    "pretrain", "finetune corners", "finetune bars", "merge", "experts extracted", "experts corners", "experts bars",
    "router",
]  # fmt: skip


def python_run(folder: Path, **trainer) -> SuiteRun:
    """What `tests/tiny.yaml` says, written in Python."""
    L.seed_everything(0, verbose=False)
    config = yaml.safe_load(TINY.read_text())["model"]["init_args"]["backbone"]["init_args"]["config"]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return SuiteRun(
        FineTuner(TransformersBackbone(config=config, pooling="mean"), optimizer=partial(torch.optim.AdamW, lr=3e-3)),
        TinySuite(),
        folder,
        trainer={"max_epochs": 1, **quiet, **trainer},
        settings=Settings(
            merge=MergeSettings({"FR": FRMerging(scale=0.5), "task arithmetic": TaskArithmetic()}, scales=[0.3, 1.0]),
            experts=ExpertsSettings(density=0.05, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3)),
            router=RouterSettings(optimizer=partial(torch.optim.AdamW, lr=1e-2)),
        ),
    )


def from_the_command_line(folder: Path) -> int:
    overlay = folder.parent / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"merge": {"methods": METHODS}, "trainer": {"max_epochs": 1}}))
    return main(["fit", "--config", str(TINY), "--config", str(overlay), "--run.folder", str(folder)])


@pytest.mark.parametrize("python_first", [True, False])
def test_either_goes_on_where_the_other_was(tmp_path: Path, capsys, python_first: bool) -> None:
    folder = tmp_path / "run"
    first = python_run(folder).run() if python_first else from_the_command_line(folder)
    assert "done already" not in capsys.readouterr().out
    second = from_the_command_line(folder) if python_first else python_run(folder).run()
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines() if "done already" in line] == STAGES
    report = first if python_first else second
    assert {row.name for row in report.rows} >= {"FR", "task arithmetic", "FREE trained (routed)"}
    assert FreeModel.from_pretrained(folder / "free_model").tasks == ("corners", "bars")


def test_what_changes_a_result_changes_the_keys_and_nothing_else_does(tmp_path: Path) -> None:
    config = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 32, "image_size": 8, "patch_size": 4, "num_channels": 1}  # fmt: skip

    def said(trainer=None, settings=None, tuner=None, **changes):
        backbone = TransformersBackbone(config={**config, **changes})
        return dependencies(tuner or FineTuner(backbone), trainer or {}, settings or Settings())

    usual = said()
    assert said({"callbacks": [], "devices": 2, "logger": False, "max_epochs": None}) == usual
    assert said(settings=Settings(experts=ExpertsSettings(optimizer=torch.optim.AdamW))) == usual
    different = [
        said({"max_epochs": 3}),
        said({"callbacks": [EarlyStopping("val/acc", patience=2)]}),
        said({"callbacks": [EarlyStopping("val/acc", patience=3)]}),
        said(hidden_dropout_prob=0.5),
        said(hidden_act="relu"),
        said(settings=Settings(merge=MergeSettings(scales=[1.0]))),
        said(settings=Settings(router=RouterSettings(trainer={"max_steps": 7}))),
        said(settings=Settings(router=RouterSettings(schedule=partial(torch.optim.lr_scheduler.StepLR, step_size=2)))),
        said(tuner=FineTuner(ModuleBackbone(torch.nn.Flatten(), 64), label_smoothing=0.1)),
        said(tuner=FineTuner(ModuleBackbone(torch.nn.Flatten(), 64), optimizer=partial(torch.optim.SGD, lr=0.1))),
    ]
    assert all(one != other for i, one in enumerate([usual, *different]) for other in different[i:])
    file = tmp_path / "a" / "tokenizer.json"
    file.parent.mkdir()
    file.touch()
    assert plain({"b": {2, 1}, "c": file, "d": 1.0}) == {"b": [1, 2], "c": "tokenizer.json", "d": 1}


def test_an_unknown_trainer_argument_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Trainer has no argument 'max_epoch'; did you mean 'max_epochs'"):
        python_run(tmp_path, max_epoch=1)
