"""Uploads to the Hub, with huggingface_hub's client against a server on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from freemerge.checkpoints import CheckpointError, check_repository
from freemerge.cli import main
from freemerge.models import FreeModel, ModuleBackbone
from tests.checkpoints import hub_server


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """The server's directory and its address."""
    root = tmp_path_factory.mktemp("hub")
    with hub_server.serving(root) as address:
        yield root, address


@pytest.fixture
def hub(server, monkeypatch) -> tuple[Path, str]:
    """The same, reached by the client of this process."""
    monkeypatch.setattr(constants, "ENDPOINT", server[1])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    return server


@pytest.fixture
def command(tmp_path, monkeypatch) -> list[str]:
    """A merge of two models into the folder `merged`."""
    monkeypatch.chdir(tmp_path)
    for index, name in enumerate(("base", "tuned")):
        (tmp_path / name).mkdir()
        save_file({"weight": torch.full((2,), float(index))}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "own"}))
    start = ["merge", "--base", "base", "--finetuned", "tuned", "--method", "TaskArithmetic", "--method.scale", "0.5"]
    return [*start, "--output", "merged"]


def test_a_merged_folder_is_uploaded_whole(hub, command, tmp_path, capsys) -> None:
    root, address = hub
    assert main([*command, "--push_to_hub", "org/merged"]) == 0
    sha = hub_server.commit("org/merged", "main")
    assert capsys.readouterr().out == f"merged into merged\nuploaded to {address}/org/merged/commit/{sha}\n"
    uploaded = root / "org/merged/main"
    assert load_file(uploaded / "model.safetensors")["weight"].tolist() == [0.5, 0.5]
    for name in ("config.json", "freemerge.json", "README.md"):
        assert (uploaded / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    assert "TaskArithmetic" in (uploaded / "README.md").read_text()


def test_a_free_model_is_uploaded_with_a_card(hub) -> None:
    root, address = hub
    model = FreeModel(ModuleBackbone(torch.nn.Linear(3, 2), feature_dim=2), {"birds": torch.nn.Linear(2, 5)})
    assert model.push_to_hub("org/free", private=True).startswith(f"{address}/org/free/commit/")
    assert (root / "org/free/private.txt").read_text() == "True"
    card = (root / "org/free/main/README.md").read_text()
    assert card.startswith("---\nlibrary_name: freemerge\n")
    assert 'FreeModel.from_pretrained("org/free")' in card
    assert "| birds | none |" in card
    assert json.loads((root / "org/free/main/freemerge.json").read_text())


def test_a_refused_upload_keeps_the_merged_folder(hub, command, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main([*command, "--push_to_hub", "org/refused"]) == 2
    said = capsys.readouterr()
    assert said.out == "merged into merged\n"
    assert said.err.startswith("error: push_to_hub: org/refused: the upload failed: ")
    assert said.err.endswith("; the merged folder is merged\n")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--push_to_hub", "name"], "push_to_hub: 'name' is no name of a model on the Hub, such as org/name"),
        (["--push_to_hub", "org/x", "--output", "m.safetensors"], "push_to_hub: uploads a folder; give --output"),
    ],
)
def test_what_cannot_succeed_is_refused_before_the_merge(hub, command, tmp_path, capsys, options, message) -> None:
    assert main([*command, *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (tmp_path / "merged").exists()


def test_without_a_connection_or_a_token(hub, monkeypatch) -> None:
    check_repository("org/x")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(CheckpointError, match="org/x needs a token; log in with `hf auth login`"):
        check_repository("org/x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="org/x cannot be uploaded while HF_HUB_OFFLINE is set"):
        check_repository("org/x")
