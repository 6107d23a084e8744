"""README's commands, configurations and programs work."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml

from freemerge.checkpoints import load_checkpoint, save_checkpoint
from freemerge.cli import main
from freemerge.merging import FRMerging, Gaussian, HighPass, PCBMerging, merge
from freemerge.models import TransformersBackbone
from freemerge.tuning import Range, Space
from tests.configs import tiny_files
from tests.configs.test_configs import VIT

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """Every `python -m freemerge …` of README's shell blocks, as arguments."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    calls = [part for line in lines for part in line.split("&&") if "python -m freemerge" in part]
    return [shlex.split(call)[3:] for call in calls]


def test_readme_has_the_two_commands_first() -> None:
    assert blocks("bash")[0].splitlines() == [
        'pip install -e ".[quickstart]" && python -m freemerge fit --config configs/quickstart.yaml',
        'pip install -e ".[test]" && pytest',
    ]


def test_the_merge_command_of_readme_merges(tmp_path, monkeypatch) -> None:
    from freemerge.__main__ import main as entry

    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        save_checkpoint(f"{name}.safetensors", {"layer.weight": weight, "layer.bias": weight[:, 0]})
    command = next(command for command in commands() if command[0] == "merge")
    monkeypatch.setattr(sys, "argv", ["freemerge", *command])
    assert entry() == 0
    monkeypatch.setattr(sys, "argv", ["freemerge", *next(each for each in commands() if each[0] == "advise")])
    assert entry() == 0
    base, merged = load_checkpoint("base.safetensors"), load_checkpoint("merged.safetensors")
    # FR-Merging passes biases unfiltered and aligns their mean magnitudes to the larger one.
    vectors = [load_checkpoint(f"{name}.safetensors")["layer.bias"] - base["layer.bias"] for name in "ab"]
    means = [vector.abs().mean() for vector in vectors]
    aligned = sum(vector * max(means) / mean for vector, mean in zip(vectors, means, strict=True))
    torch.testing.assert_close(merged["layer.bias"], base["layer.bias"] + 0.7 * aligned)


def test_the_suite_and_the_configuration_of_readme_go_together(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    source = next(block for block in blocks("python") if "class MySuite" in block)
    (tmp_path / "my_tasks.py").write_text(source)
    (tmp_path / "my.yaml").write_text(blocks("yaml")[0])
    command = next(command for command in commands() if "my.yaml" in command)
    for data, expected in (([], "freemerge.data.SourceSuite"), (["--data", "my_tasks.MySuite"], "my_tasks.MySuite")):
        with pytest.raises(SystemExit) as stop:
            main([*command, *data, "--print_config"])
        assert stop.value.code == 0
        config = yaml.safe_load(capsys.readouterr().out)
        assert config["data"]["class_path"] == expected
        assert config["trainer"]["devices"] in (4, "4")


def test_the_python_program_of_readme_runs(tmp_path, monkeypatch, capsys) -> None:
    """Run twice, with a tiny model and tiny images instead of the named ones; the second run resumes."""
    monkeypatch.chdir(tmp_path)
    for task in ("birds", "planes"):
        tiny_files.write_image_folders(tmp_path / "data" / task)
    TransformersBackbone(config=VIT).save_pretrained("tiny")
    program = next(block for block in blocks("python") if "SuiteRun(" in block)
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


def test_the_overrides_and_the_method_of_readme_merge(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("encoder.mlp.weight", "encoder.attention.weight", "norm")
    models = {}
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        models[name] = {tensor: torch.randn(8, 8, generator=generator) for tensor in names}
        save_checkpoint(f"{name}.safetensors", models[name])
    (tmp_path / "m.yaml").write_text(next(block for block in blocks("yaml") if "overrides:" in block))
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
    (tmp_path / "my_methods.py").write_text(next(block for block in blocks("python") if "class Median" in block))
    assert main([*inputs, "--method", "my_methods.Median", "--output", "median.safetensors"]) == 0
    smaller = torch.minimum(models["a"]["norm"], models["b"]["norm"])  # torch's median of two
    torch.testing.assert_close(load_checkpoint("median.safetensors")["norm"], smaller)


def test_the_tuning_configuration_of_readme_parses(tmp_path, capsys) -> None:
    (tmp_path / "tune.yaml").write_text(next(block for block in blocks("yaml") if block.startswith("tune:")))
    tiny = str(ROOT / "tests" / "tiny.yaml")
    with pytest.raises(SystemExit) as stop:
        main(["tune", "--config", tiny, "--config", str(tmp_path / "tune.yaml"), "--print_config"])
    assert stop.value.code == 0
    settings = yaml.safe_load(capsys.readouterr().out)["tune"]
    method = PCBMerging(scale=0.3, filter=HighPass(0.1))
    space = Space(method, ("a", "b"), {path: Range(**bounds) for path, bounds in settings["space"].items()})
    assert [each.name for each in space.parameters] == ["scale/a", "scale/b", "ratio", "filter.cutoff"]
    assert settings["method"]["init_args"]["scale"] == 0.3


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)\)", README))))
def test_every_file_that_readme_links_to_exists(path: str) -> None:
    assert (ROOT / path).exists()
