"""The programs, commands and configurations of the tutorials and how-to pages do what the pages say."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from torch import nn

from freemerge import testing
from freemerge.checkpoints import load_checkpoint, save_checkpoint
from freemerge.cli import main
from freemerge.experts import load_expert
from freemerge.merging import FRMerging, Gaussian, HighPass, PCBMerging, merge, task_vector
from freemerge.models import ConvRouter, EarlyRouter, FreeModel, TransformersBackbone
from freemerge.tuning import Range, Space
from tests.configs import tiny_files
from tests.configs.test_configs import VIT
from tests.language_models import expert_of, language_model
from tests.pages import ROOT, block, blocks, commands
from tests.tiny import tiny_backbone

FINISHED = "docs/tutorials/finished_checkpoints.md"
OWN_DATA = "docs/tutorials/own_data.md"
LANGUAGE = "docs/tutorials/language_models.md"
EXTEND = "docs/how_to/extend.md"


def write_models(*names: str) -> dict[str, dict[str, torch.Tensor]]:
    """base, a and b.safetensors with (8, 8) tensors of these names, in the working directory."""
    models = {}
    for seed, model in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        models[model] = {name: torch.randn(8, 8, generator=generator) for name in names}
        save_checkpoint(f"{model}.safetensors", models[model])
    return models


def test_the_commands_on_finished_checkpoints(tmp_path, monkeypatch) -> None:
    from freemerge.__main__ import main as entry

    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        save_checkpoint(f"{name}.safetensors", {"layer.weight": weight, "layer.bias": weight[:, 0]})
    advise, dry, command = commands(FINISHED)
    assert (advise[0], dry[0], command[0], dry[-1]) == ("advise", "merge", "merge", "--dry_run")
    for arguments in (advise, dry):
        monkeypatch.setattr(sys, "argv", ["freemerge", *arguments])
        assert entry() == 0
        assert not Path("merged.safetensors").exists()
    monkeypatch.setattr(sys, "argv", ["freemerge", *command])
    assert entry() == 0
    base, merged = load_checkpoint("base.safetensors"), load_checkpoint("merged.safetensors")
    # FR-Merging passes biases unfiltered and aligns their mean magnitudes to the larger one.
    vectors = [load_checkpoint(f"{name}.safetensors")["layer.bias"] - base["layer.bias"] for name in "ab"]
    means = [vector.abs().mean() for vector in vectors]
    aligned = sum(vector * max(means) / mean for vector, mean in zip(vectors, means, strict=True))
    torch.testing.assert_close(merged["layer.bias"], base["layer.bias"] + 0.7 * aligned)


def test_the_program_on_finished_checkpoints(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    models = write_models("encoder.weight")
    save_checkpoint("base/model.safetensors", models["base"])
    for name in "ab":
        save_checkpoint(f"{name}/model.safetensors", models[name] | {"classifier.weight": torch.ones(2, 8)})
    names = {"base": models["base"], "model_a": models["a"]}
    exec(block(FINISHED, "python", "freemerge.merge("), names)
    expected = merge(models["base"], [models["a"], models["b"]], PCBMerging(ratio=0.1))
    assert torch.equal(names["merged"]["encoder.weight"], expected["encoder.weight"])
    assert list(load_checkpoint("merged.safetensors")) == ["encoder.weight"]


def test_the_overrides_merge(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    models = write_models("encoder.mlp.weight", "encoder.attention.weight", "norm")
    Path("m.yaml").write_text(block(FINISHED, "yaml", "overrides:"))
    inputs = ["merge", "--base", "base.safetensors", "--finetuned", "[a.safetensors, b.safetensors]"]
    assert main([*inputs, "--config", "m.yaml", "--output", "overrides.safetensors"]) == 0
    expected = {
        "encoder.mlp.weight": FRMerging(Gaussian(0.1), scale=0.4),
        "encoder.attention.weight": FRMerging(Gaussian(0.2), scale=[0.5, 0.3]),
        "norm": FRMerging(Gaussian(0.1)),
    }
    merged = load_checkpoint("overrides.safetensors")
    for name, method in expected.items():
        assert torch.equal(merged[name], merge(models["base"], [models["a"], models["b"]], method)[name])


def test_the_suite_and_the_configuration_of_own_data_go_together(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("my_tasks.py").write_text(block(OWN_DATA, "python", "class MySuite"))
    Path("my.yaml").write_text(block(OWN_DATA, "yaml", "# my.yaml"))
    command = next(command for command in commands(OWN_DATA) if "my.yaml" in command)
    for data, expected in (([], "freemerge.data.SourceSuite"), (["--data", "my_tasks.MySuite"], "my_tasks.MySuite")):
        with pytest.raises(SystemExit) as stop:
            main([*command, *data, "--print_config"])
        assert stop.value.code == 0
        config = yaml.safe_load(capsys.readouterr().out)
        assert config["data"]["class_path"] == expected
        assert config["trainer"]["devices"] in (4, "4")


def test_the_text_table_of_own_data_is_read(tmp_path, monkeypatch) -> None:
    from freemerge.data import TextTableSource

    monkeypatch.chdir(tmp_path)
    Path("reviews.csv").write_text(block(OWN_DATA, "csv", "split,text,label"))
    tokenizer = tiny_files.write_tokenizer(tmp_path / "tokenizer")
    task = TextTableSource(path="reviews.csv", text=["text"], tokenizer=tokenizer, val_fraction=0.5).build("reviews", 0)
    assert task.class_names == ("negative", "positive")
    assert [len(split) for split in (task.train, task.val, task.test)] == [1, 1, 1]


def test_the_run_from_python(tmp_path, monkeypatch, capsys) -> None:
    """Run twice, with a tiny model and tiny images instead of the named ones; the second run resumes."""
    monkeypatch.chdir(tmp_path)
    for task in ("birds", "planes"):
        tiny_files.write_image_folders(tmp_path / "data" / task)
    TransformersBackbone(config=VIT).save_pretrained("tiny")
    program = block("docs/tutorials/from_python.md", "python", "SuiteRun(")
    for large, small in (
        ("google/vit-base-patch16-224-in21k", "tiny"),
        ("224", "8"),
        ('"max_epochs": 5', '"max_steps": 2'),
    ):
        assert large in program
        program = program.replace(large, small)
    names: dict = {}
    exec(program, names)
    assert {row.name for row in names["report"].rows} >= {"individual", "FR", "FREE trained (routed)"}
    capsys.readouterr()
    exec(program, {})
    assert "finetune planes: done already" in capsys.readouterr().out
    assert names["suite"]["birds"].num_classes == 3


def test_the_search_of_parameters_parses(tmp_path, capsys) -> None:
    (tmp_path / "tune.yaml").write_text(block("docs/how_to/choose_lambda.md", "yaml", "tune:"))
    tiny = str(ROOT / "tests" / "tiny.yaml")
    with pytest.raises(SystemExit) as stop:
        main(["tune", "--config", tiny, "--config", str(tmp_path / "tune.yaml"), "--print_config"])
    assert stop.value.code == 0
    settings = yaml.safe_load(capsys.readouterr().out)["tune"]
    method = PCBMerging(scale=0.3, filter=HighPass(0.1))
    space = Space(method, ("a", "b"), {path: Range(**bounds) for path, bounds in settings["space"].items()})
    assert [each.name for each in space.parameters] == ["scale/a", "scale/b", "ratio", "filter.cutoff"]
    assert settings["method"]["init_args"]["scale"] == 0.3


def test_the_experts_of_the_how_to_page(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    backbone = tiny_backbone()
    merged = {name: tensor.clone() for name, tensor in backbone.weights().items()}
    finetuned = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in merged.items()}
    names = {
        "merged": merged,
        "finetuned": finetuned,
        "backbone": backbone,
        "heads": {"digits": nn.Linear(backbone.feature_dim, 3)},
        "router": ConvRouter(num_tasks=1, channels=1),
        "images": torch.rand(2, 1, 8, 8),
    }
    exec(block("docs/how_to/experts_and_router.md", "python", "extract_low_rank"), names)
    residual, expert = task_vector(merged, finetuned), load_expert("digits.safetensors", merged=merged)
    weight = next(name for name, tensor in residual.items() if tensor.dim() == 2)
    left = torch.linalg.norm(residual[weight] - expert.dense()[weight])
    assert left < torch.linalg.norm(residual[weight])
    assert names["model"].task_model("digits")(names["images"]).shape == (2, 3)


def test_the_callback_of_readme(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"L": L}
    exec(block("README.md", "python", "MergeAtFitEnd"), names)
    assert names["trainer"].callbacks.count(names["merge"]) == 1


def test_the_programs_on_language_models(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    backbone = language_model("llama")
    backbone.tokenizer = tiny_files.write_tokenizer(tmp_path / "tokenizer")
    tasks = ("arithmetic", "code")
    experts = {task: expert_of(backbone, seed) for seed, task in enumerate(tasks)}
    router = EarlyRouter(2, "model.layers.0", 16)
    model = FreeModel(backbone, {task: nn.Identity() for task in tasks}, experts, router)
    model.save_pretrained("runs/causal_lm_lora/free_model")
    for page in (LANGUAGE, "README.md"):
        names = {"FreeModel": FreeModel}
        exec(block(page, "python", "model.generate("), names)
        assert names["answers"].tokens.shape[0] in (1, 2)
    assert names["answers"].task_names == model.eval().generate(["3 + 4 =", "def reverse(values):"]).task_names
    assert main(next(command for command in commands(LANGUAGE) if command[0] == "export-experts")) == 0
    assert sorted(path.name for path in Path("adapters/adapters").iterdir()) == list(tasks)


@pytest.mark.parametrize("kind", ["methods", "sources", "backbones", "experts"])
def test_the_classes_of_ones_own_pass_their_checks(kind: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    Path(f"my_{kind}.py").write_text(block(EXTEND, "python", f"# my_{kind}.py"))
    program = block(EXTEND, "python", f"from my_{kind} import")
    assert re.search(rf"^check_{kind.removesuffix('s')}\(", program, re.MULTILINE)
    exec(program, {})
    assert len(blocks(EXTEND, "python")) == 2 * len(testing.__all__)


def test_the_method_of_ones_own_merges_by_its_path(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    models = write_models("norm")
    Path("my_methods.py").write_text(block(EXTEND, "python", "# my_methods.py"))
    inputs = ["merge", "--base", "base.safetensors", "--finetuned", "[a.safetensors, b.safetensors]"]
    assert main([*inputs, "--method", "my_methods.Median", "--output", "median.safetensors"]) == 0
    smaller = torch.minimum(models["a"]["norm"], models["b"]["norm"])  # torch's median of two
    torch.testing.assert_close(load_checkpoint("median.safetensors")["norm"], smaller)
