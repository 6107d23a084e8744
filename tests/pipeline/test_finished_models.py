"""Finished fine-tuned models are taken instead of a fit: the run goes on from them as from its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from freemerge.cli import main
from tests.tiny import tiny_backbone

TINY = Path(__file__).parent.parent / "tiny.yaml"


def config(folder: Path, base: Path, **sections) -> list[str]:
    """Arguments of a command on a run that starts from a base in a folder."""
    given = yaml.safe_load(TINY.read_text())
    backbone = {"class_path": "TransformersBackbone", "init_args": {"pretrained": str(base), "pooling": "mean"}}
    given["model"]["init_args"] |= {"backbone": backbone, "head": "probe"}
    given["trainer"]["max_epochs"] = 1
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(given | {"merge": {"scales": [0.3, 1.0]}} | sections))
    return ["--config", str(path), "--run.folder", str(folder), "--run.stages", "[finetune, merge, evaluate]"]


def scores(folder: Path) -> dict[str, dict[str, float]]:
    return {row["name"]: row["scores"] for row in json.loads((folder / "report.json").read_text())["rows"]}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_backbone().model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_run_from_another_runs_models_is_that_run(tmp_path: Path, base: Path, capsys) -> None:
    assert main(["fit", *config(tmp_path / "first", base)]) == 0
    models = {
        task: str(tmp_path / "first" / "finetune" / task / "backbone.safetensors") for task in ("corners", "bars")
    }
    taken = config(tmp_path / "second", base, finetune={"models": models})
    assert main(["fit", *taken]) == 0
    assert scores(tmp_path / "second") == scores(tmp_path / "first")
    for task in models:
        first, second = (
            load_file(tmp_path / run / "finetune" / task / "head.safetensors") for run in ("first", "second")
        )
        assert all(torch.equal(first[name], second[name]) for name in first)
    capsys.readouterr()
    assert main(["fit", *taken]) == 0
    assert capsys.readouterr().out.count("done already") == 3
    # Another file of the same name is another model: its task alone is taken anew, and what depends on it.
    moved = {name: 1.01 * tensor for name, tensor in load_file(models["bars"]).items()}
    save_file(moved, models["bars"])
    assert main(["fit", *taken, "--run.overwrite", "true"]) == 0
    said = capsys.readouterr().out
    assert "finetune corners: done already" in said
    assert "finetune bars: done already" not in said
    kept = load_file(tmp_path / "second" / "finetune" / "bars" / "backbone.safetensors")
    assert all(torch.equal(kept[name], moved[name]) for name in kept)


def test_a_folder_a_fit_and_a_model_without_a_tensor_go_together(tmp_path: Path, base: Path, capsys) -> None:
    weights = tiny_backbone(seed=1).weights()
    left_out = [name for name in weights if name.startswith("embeddings.")]
    save_file(
        {name: value for name, value in weights.items() if name not in left_out}, tmp_path / "corners.safetensors"
    )
    finetune = {"models": {"corners": str(tmp_path / "corners.safetensors")}, "exclude": ["embeddings.*"]}
    assert main(["fit", *config(tmp_path / "run", base, finetune=finetune)]) == 0
    own = tiny_backbone().weights()
    kept = load_file(tmp_path / "run" / "finetune" / "corners" / "backbone.safetensors")
    assert kept.keys() == own.keys()
    for name, tensor in kept.items():
        assert torch.equal(tensor, own[name] if name in left_out else weights[name])


def test_a_model_of_a_task_that_is_not_selected_is_left_alone(tmp_path: Path, base: Path, capsys) -> None:
    weights = tiny_backbone(seed=1).weights()
    save_file(weights, tmp_path / "corners.safetensors")
    models = {"corners": str(tmp_path / "corners.safetensors"), "bars": "there_is/no_such_model"}
    arguments = config(tmp_path / "run", base, finetune={"models": models})
    assert main(["fit", *arguments, "--data.tasks", "[corners]", "--run.stages", "[finetune]"]) == 0
    kept = load_file(tmp_path / "run" / "finetune" / "corners" / "backbone.safetensors")
    assert all(torch.equal(kept[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("finetune", "model", "message"),
    [
        (
            {"models": {"corner": "x.safetensors"}},
            {},
            "finetune.models: there is no task 'corner'; did you mean 'corners'?",
        ),
        ({"models": {"bars": "no.safetensors"}}, {}, "finetune.models, bars: no.safetensors: does not exist"),
        ({"models": {"bars": "other.safetensors"}}, {}, "finetune.models, bars: other.safetensors: the tensor"),
        ({"models": {"bars": "other.safetensors"}}, {"head": "linear"}, "need a head that is made from the base"),
        ({"models": {"bars": "other.safetensors"}}, {"peft": {"kind": "lora", "r": 2}}, "leave model.peft out"),
    ],
)
def test_models_that_do_not_fit_are_refused_before_any_fit(
    tmp_path: Path, base: Path, capsys, monkeypatch, finetune: dict, model: dict, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"other": torch.ones(2)}, "other.safetensors")
    arguments = config(tmp_path / "run", base, finetune=finetune)
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"model": {"init_args": model}}))
    assert main(["fit", *arguments[:2], "--config", str(overlay), *arguments[2:]]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert not (tmp_path / "run" / "finetune").exists()
