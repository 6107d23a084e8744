"""Hub ids are accepted like paths; tested with huggingface_hub's client against a server on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from freemerge.checkpoints import CheckpointError, open_checkpoint
from freemerge.checkpoints import hub as hub_module
from freemerge.merging import MergeError, TaskArithmetic, merge
from freemerge.models import FreeModel, ModuleBackbone
from tests.checkpoints.hub_server import serving

ASK = """
import json, sys, torch
from freemerge.checkpoints import CheckpointError, load_checkpoint
answers = []
for name in json.loads(sys.argv[1]):
    try:
        answers.append(load_checkpoint(name)["weight"].tolist())
    except CheckpointError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def publish(folder: Path, value: float, name: str = "model.safetensors") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".bin"):
        torch.save({"weight": torch.full((2,), value)}, folder / name)
    else:
        save_file({"weight": torch.full((2,), value)}, folder / name)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """The server's directory and its address."""
    root = tmp_path_factory.mktemp("hub")
    publish(root / "org/base/main", 1.0)
    publish(root / "org/base/main", 9.0, "pytorch_model.bin")
    (root / "org/base/main/tokenizer.json").write_text("{}")
    (root / "org/base/main/model.onnx").write_bytes(b"onnx")
    publish(root / "org/base/v1", 2.0)
    publish(root / "org/pickled/main", 3.0, "pytorch_model.bin")
    publish(root / "org/many/main/small", 4.0)
    publish(root / "org/many/main/large", 5.0)
    (root / "org/words/main").mkdir(parents=True)
    (root / "org/words/main/README.md").write_text("words")
    with serving(root) as address:
        yield root, address


def environment(address: str, cache: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", **more}


def ask(names: list[str], address: str, cache: Path, where: Path, **more: str) -> list[list[float] | str]:
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(names)],
        capture_output=True,
        text=True,
        env=environment(address, cache, **more),
        cwd=where,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_ids_revisions_subfolders_and_errors(hub, tmp_path: Path) -> None:
    root, address = hub
    (tmp_path / "runs").mkdir()
    names = ["org/base", "org/base@v1", "org/pickled", "org/many/small", "org/nobody", "org/base@v2", "org/gated",
             "org/words", "org/many/middle", "runs/model"]  # fmt: skip
    found = ask(names, address, tmp_path / "cache", tmp_path)
    assert found[:4] == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]]
    for message, part in zip(
        found[4:],
        [
            "org/nobody: there is neither such a path nor a model of this name on the Hub",
            "org/base@v2: the model org/base has no revision 'v2' on the Hub",
            "org/gated: access to this model on the Hub must be granted",
            "org/words: the model on the Hub has no weights in a format that is read here; it has README.md",
            "org/many/middle: the model on the Hub has no folder 'middle' with weights; it has large/conf",
            "runs/model: does not exist; check the path",
        ],
        strict=True,
    ):
        assert isinstance(message, str)
        assert message.startswith(part)
        assert "\n" not in message
    asked = (root / "requests.txt").read_text()
    assert "tokenizer.json" in asked  # a companion of the weights
    assert not [name for name in ("model.onnx", "many/resolve/main/large") if name in asked]
    fetched = [line for line in asked.splitlines() if "org/base/resolve" in line]
    assert not any("pytorch_model.bin" in line for line in fetched)
    # Without the Hub, cached files are found and others refused.
    offline = ask(
        ["org/base", "org/base@v1", "org/many/large"], address, tmp_path / "cache", tmp_path, HF_HUB_OFFLINE="1"
    )
    assert offline[:2] == [[1.0, 1.0], [2.0, 2.0]]
    assert offline[2] == "org/many/large: the cached model has no folder 'large'"
    dead = ask(["org/base", "org/other"], "http://127.0.0.1:9", tmp_path / "cache", tmp_path)
    assert dead[0] == [1.0, 1.0]
    assert str(dead[1]).startswith(
        "org/other: there is no such path, the Hub's cache does not hold a model of this name"
    )


def test_merge_takes_ids_and_brings_the_companions(hub, tmp_path: Path) -> None:
    _, address = hub
    command = ["merge", "--base", "org/base", "--finetuned", "[org/base@v1, org/pickled]", "--method", "TaskArithmetic"]
    done = subprocess.run(
        [sys.executable, "-m", "freemerge", *command, "--method.scale", "0.5", "--output", str(tmp_path / "merged")],
        capture_output=True,
        text=True,
        env=environment(address, tmp_path / "cache"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    merged = load_file(tmp_path / "merged" / "model.safetensors")["weight"]
    assert merged.tolist() == [1.0 + 0.5 * (1.0 + 2.0)] * 2
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    record = json.loads((tmp_path / "merged" / "freemerge.json").read_text())
    assert [record["base"]["hub"], *(model["hub"] for model in record["finetuned"])] == [
        "org/base",
        "org/base",
        "org/pickled",
    ]
    card = (tmp_path / "merged" / "README.md").read_text()
    assert 'base_model:\n- "org/base"\n- "org/pickled"\ntags:' in card
    assert "| fine-tuned | org/base@v1 |" in card


def test_a_free_model_of_the_hub_is_loaded(hub, tmp_path: Path) -> None:
    root, address = hub
    backbone = ModuleBackbone(torch.nn.Linear(3, 2), feature_dim=2)
    FreeModel(backbone, {"a": torch.nn.Linear(2, 5)}).save_pretrained(root / "org/free/main")
    script = """
from freemerge.models import FreeModel
from torch import nn
from freemerge.models import ModuleBackbone
model = FreeModel.from_pretrained("org/free", backbone=ModuleBackbone(nn.Linear(3, 2), feature_dim=2))
print(model.backbone.model.weight.tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment(address, tmp_path / "cache"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == backbone.model.weight.tolist()


def test_a_path_that_exists_is_not_looked_up(tmp_path: Path, monkeypatch) -> None:
    publish(tmp_path / "org/base", 7.0)
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("org/base").tensor("weight").tolist() == [7.0, 7.0]
    with pytest.raises(CheckpointError, match="org/bass: does not exist"):
        open_checkpoint("org/bass")


def test_a_merge_asks_the_hub_once_for_each_model_and_calls_it_by_its_id(tmp_path: Path, monkeypatch) -> None:
    for name, value in (("base", 1.0), ("one", 3.0)):
        publish(tmp_path / name, value)
    asked = []

    def download(source: str, repository: str, *_: str | None) -> Path:
        asked.append(source)
        return tmp_path / repository.partition("/")[2]

    monkeypatch.setattr(hub_module, "_download", download)
    monkeypatch.chdir(tmp_path)
    merged = merge("org/base", ["org/one"], TaskArithmetic(0.5))
    assert merged["weight"].tolist() == [2.0, 2.0]
    assert asked == ["org/base", "org/one"]
    publish(tmp_path / "one", float("nan"))
    with pytest.raises(MergeError, match="org/one"):
        merge("org/base", ["org/one"], TaskArithmetic(0.5))
