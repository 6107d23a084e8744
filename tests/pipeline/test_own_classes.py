"""Backbones, modules and heads of one's own go through all stages, and are saved, loaded and run."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from freemerge.checkpoints import CheckpointError
from freemerge.cli import main
from freemerge.models import FreeModel
from tests.models.own_parts import ShiftExpert
from tests.pipeline.own_classes import CosineHead, OwnBackbone, OwnNet
from tests.tiny import TinySuite

TINY = Path(__file__).parent.parent / "tiny.yaml"
OWN = "tests.pipeline.own_classes"
MODULE = {"class_path": f"{OWN}.OwnNet", "init_args": {"slope": 0.5}}
NET = {"class_path": "ModuleBackbone", "init_args": {"module": MODULE, "pretrained": True}}


def run_all(folder: Path, tuner: str, base: dict, capsys, settings: dict | None = None, **given) -> FreeModel:
    """`fit`, `test` and `predict`; the model that a folder gives, whose scores must be the report's."""
    config = yaml.safe_load(TINY.read_text())
    config["model"] = {"class_path": tuner, "init_args": {"backbone": base, "head": "linear"}}
    config |= {"merge": {"scales": [1.0]}, "trainer": {**config["trainer"], "max_steps": 3}, **(settings or {})}
    (folder / "own.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", str(folder / "own.yaml"), "--run.folder", str(folder / "run")]
    assert main(["fit", *arguments]) == 0
    lines = {row["name"]: row for row in json.loads((folder / "run" / "report.json").read_text())["rows"]}
    capsys.readouterr()
    assert main(["test", *arguments]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for task, score in lines["FREE trained (routed)"]["scores"].items():
        assert re.search(rf"{task} \w+ {100 * score:.1f}\b", said)
    assert main(["predict", *arguments]) == 0
    model = FreeModel.from_pretrained(folder / "run" / "free_model", **given)
    with (folder / "run" / "predictions.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["loader"] == "bars"]
    with torch.no_grad():
        output = model(torch.stack([image for image, _ in TinySuite().task("bars").test]))
    assert [row["routed_task"] for row in rows] == output.task_names
    classes = [model.class_names[task][label] for task, label in zip(output.task_names, output.labels, strict=True)]
    assert [row["class"] for row in rows] == classes
    return model


def test_a_module_that_a_configuration_built_is_built_again_if_trusted(tmp_path: Path, capsys) -> None:
    model = run_all(tmp_path, "FineTuner", NET, capsys, trust_remote_code=True)
    assert isinstance(model.backbone.model, OwnNet)
    assert model.backbone.model.slope == 0.5
    with pytest.raises(CheckpointError, match=r"the backbone's module is a .*OwnNet, which is not imported by default"):
        FreeModel.from_pretrained(tmp_path / "run" / "free_model")


def test_heads_with_hidden_layers_and_without_bias(tmp_path: Path, capsys) -> None:
    backbone = {"class_path": f"{OWN}.OwnBackbone", "init_args": {"width": 12}}
    model = run_all(tmp_path, f"{OWN}.OwnTuner", backbone, capsys, backbone=OwnBackbone(12))
    assert [type(layer) for layer in model.heads["bars"]] == [nn.Linear, nn.GELU, nn.Linear]
    assert model.heads["bars"][2].bias is None


def test_heads_of_a_class_of_ones_own(tmp_path: Path, capsys) -> None:
    backbone = {"class_path": f"{OWN}.OwnBackbone"}
    model = run_all(tmp_path, f"{OWN}.CosineTuner", backbone, capsys, trust_remote_code=True)
    assert isinstance(model.heads["corners"], CosineHead)
    given = FreeModel.from_pretrained(
        tmp_path / "run" / "free_model",
        OwnBackbone(),
        heads={"corners": CosineHead(8, 4), "bars": CosineHead(8, 2)},
    )
    assert given.tasks == model.tasks


def test_an_expert_kind_of_ones_own(tmp_path: Path, capsys) -> None:
    net = {"class_path": f"{OWN}.OwnBackbone"}
    experts = {"kind": "tests.models.own_parts.ShiftExpert", "arguments": {"factor": 0.5}, "values": "float32"}
    model = run_all(tmp_path, "FineTuner", net, capsys, settings={"experts": experts}, backbone=OwnBackbone())
    assert type(model.experts["bars"]) is ShiftExpert
