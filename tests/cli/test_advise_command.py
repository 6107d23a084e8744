"""`python -m freemerge advise`: tables, JSON, errors in one line."""

import json

import pytest
import torch

from freemerge.checkpoints import save_checkpoint
from freemerge.cli import main
from freemerge.merging import advise


@pytest.fixture
def files(tmp_path):
    base = {"layer.weight": torch.randn(16, 12, generator=torch.Generator().manual_seed(0))}
    paths = {"base": str(tmp_path / "base.safetensors")}
    save_checkpoint(paths["base"], base)
    for seed, name in enumerate("ab", 1):
        change = 0.1 * torch.randn(16, 12, generator=torch.Generator().manual_seed(seed))
        paths[name] = str(tmp_path / f"{name}.safetensors")
        save_checkpoint(paths[name], {"layer.weight": base["layer.weight"] + change})
    return paths


def test_json_has_everything(files, capsys):
    assert (
        main(["advise", "--base", files["base"], "--finetuned", f"{{x: {files['a']}, y: {files['b']}}}", "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(advise(files["base"], {"x": files["a"], "y": files["b"]}).as_dict()))
    assert found["method"]["class_path"] == "freemerge.merging.BalancedMerging"


def test_tables_and_warnings(files, capsys):
    models = f"{{x: {files['a']}, y: {files['a']}, z: {files['b']}}}"
    assert main(["advise", "--base", files["base"], "--finetuned", models]) == 0
    out = capsys.readouterr().out
    relations = advise(files["base"], {"x": files["a"], "y": files["a"], "z": files["b"]}).relations
    rows = [line.split() for line in out.splitlines()]
    assert ["x", f"{relations.norms[0]:.4g}", f"{relations.relative_norms[0]:.4f}"] in [row[:3] for row in rows]
    assert ["x", "z", f"{relations.cosines[0][2]:.3f}"] in [row[:3] for row in rows]
    assert "warning: x and y are nearly the same model" in out
    assert "begin with: --method BalancedMerging --method.scale 1\n" in out


def test_errors_are_one_line(files, capsys):
    assert main(["advise", "--base", files["base"], "--finetuned", "missing.safetensors"]) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.startswith("error: missing.safetensors: does not exist")
    assert out.err.count("\n") == 1
