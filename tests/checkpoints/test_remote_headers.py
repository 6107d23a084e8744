"""Dry runs of models on the Hub download no weights; with the real client against a server on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from freemerge.checkpoints import CheckpointError
from freemerge.checkpoints.hub import download, find_id
from freemerge.checkpoints.remote_headers import RemoteHeaders
from freemerge.merging import MergeError, TaskArithmetic, merge, plan_merge
from tests.checkpoints import hub_server

SIZE = 200_000  # values, more than the first request reads


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """The server's directory and its address."""
    root = tmp_path_factory.mktemp("hub")
    for index, name in enumerate(("base", "tuned", "other", "damaged")):
        folder = root / "org" / name / "main"
        folder.mkdir(parents=True)
        # "other" has another shape, and so many tensors that its header is longer than the first request
        tensors = {"weight": torch.full((SIZE + 1 if name == "other" else SIZE,), float(index))}
        tensors |= {f"constant.{n}": torch.ones(1) for n in range(2000 if name == "other" else 0)}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "own"}))
    (root / "org" / "damaged" / "main" / "model.safetensors").write_bytes(b"\xff" * 100)
    with hub_server.serving(root) as address:
        yield root, address


@pytest.fixture
def hub(server, monkeypatch, tmp_path) -> Path:
    """The server's directory; the client of this process reaches it, with an empty cache."""
    monkeypatch.setattr(constants, "ENDPOINT", server[1])
    template = server[1] + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (server[0] / "requests.txt").unlink(missing_ok=True)
    return server[0]


def test_a_plan_reads_headers_only(hub, tmp_path):
    plan = plan_merge("org/base", ["org/tuned"], TaskArithmetic(), tmp_path / "out")
    assert (plan.merged, plan.parameters) == (("weight",), SIZE)
    asked = (hub / "requests.txt").read_text().splitlines()
    sent = [int(line.split()[1]) for line in asked if line.startswith("sent")]
    assert len(sent) == 2
    assert max(sent) <= 1 << 16  # of files of 800 kB
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert list((tmp_path / "cache").rglob("config.json"))


def test_misfits_are_found_before_a_download(hub, tmp_path):
    with pytest.raises(MergeError, match=r"org/other: .*'weight'.*200,?001"):
        plan_merge("org/base", ["org/tuned", "org/other"], TaskArithmetic(), tmp_path / "out")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_what_is_in_the_cache_is_used(hub, tmp_path):
    named = find_id("org/base")
    assert named is not None
    folder, wanted = download(named)
    assert sorted(wanted) == ["config.json", "model.safetensors"]
    (hub / "requests.txt").unlink()
    with RemoteHeaders() as remote:
        assert remote.locate("org/base") == folder
        assert remote.locate(tmp_path) == tmp_path
    assert "sent" not in (hub / "requests.txt").read_text()


def test_a_merge_after_the_plan_downloads_the_weights(hub, tmp_path):
    plan_merge("org/base", ["org/tuned"], TaskArithmetic(), tmp_path / "out")
    merged = merge("org/base", ["org/tuned"], TaskArithmetic(0.5))
    assert torch.equal(merged["weight"], torch.full((SIZE,), 0.5))


def test_a_damaged_file_is_named(hub):
    with RemoteHeaders() as remote, pytest.raises(CheckpointError, match=r"org/damaged: model\.safetensors on the Hub"):
        remote.locate("org/damaged")
