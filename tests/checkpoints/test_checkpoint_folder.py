"""Hugging Face folders: shards, index, companions; never partly written."""

import json
import os

import pytest
import torch

from freemerge.checkpoints import CheckpointError, TensorSpec, load_checkpoint, open_checkpoint
from freemerge.checkpoints.writing import draft as draft_module
from freemerge.checkpoints.writing.draft import Draft
from freemerge.checkpoints.writing.folder import check_folder, make_index, parse_size, plan_shards


def specs_of(tensors):
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def write(path, tensors, *, shard_size=10**9, tied=None, overwrite=False):
    check_folder(path, overwrite)
    shards = plan_shards(specs_of(tensors), shard_size)
    draft = Draft(path, shards, tied)
    draft.begin("key")
    for name, tensor in reversed(tensors.items()):
        draft.write(name, 0, tensor)
    draft.flush()
    draft.commit({"freemerge.json": b"{}", "config.json": b"{}", **make_index(shards)})


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    state = {f"layer.{index}.weight": torch.randn(10, 10, generator=generator) for index in range(6)}
    return state | {"bytes": torch.ones(5, dtype=torch.uint8), "head": torch.randn(3, generator=generator)}


@pytest.mark.parametrize(
    ("size", "count"), [(500, 500), ("500", 500), ("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2M", 2 * 10**6)]
)
def test_sizes(size, count):
    if size == "2M":
        with pytest.raises(CheckpointError, match="shard_size must be a size such as 5GB or 500MB, got '2M'"):
            parse_size(size)
    else:
        assert parse_size(size) == count


@pytest.mark.parametrize("size", ["", "big", "-1GB", "0", "5 PB"])
def test_invalid_sizes(size):
    with pytest.raises(CheckpointError, match="shard_size must be a size"):
        parse_size(size)


def test_one_file_or_shards_with_an_index(tmp_path, tensors):
    write(tmp_path / "one", tensors)
    assert sorted(os.listdir(tmp_path / "one")) == ["config.json", "freemerge.json", "model.safetensors"]
    write(tmp_path / "many", tensors, shard_size=900, tied={"tied": "layer.5.weight"})
    names = sorted(os.listdir(tmp_path / "many"))
    assert names[:3] == ["config.json", "freemerge.json", "model-00001-of-00003.safetensors"]
    assert names[-1] == "model.safetensors.index.json"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 6 * 400 + 5 + 12
    assert set(index["weight_map"]) == set(tensors)
    for path in ("one", "many"):
        loaded = load_checkpoint(tmp_path / path)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert loaded["tied"] is loaded["layer.5.weight"]
    assert sorted(os.listdir(tmp_path)) == ["many", "one"]


def test_a_tensor_larger_than_a_shard_has_its_own(tensors):
    shards = plan_shards(specs_of(tensors), 100)
    assert len(shards) == 7
    assert all(len(shard) == 1 for name, shard in shards.items() if "00007" not in name)
    assert list(shards["model-00007-of-00007.safetensors"]) == ["head", "bytes"]


def test_an_existing_output_is_refused(tmp_path, tensors):
    path = tmp_path / "model"
    path.mkdir()
    write(path, tensors)  # replacing an empty folder loses nothing
    with pytest.raises(CheckpointError, match="model: exists already; choose another output"):
        write(path, tensors)
    changed = tensors | {"head": torch.zeros(3)}
    write(path, changed, overwrite=True)
    assert load_checkpoint(path)["head"].tolist() == [0, 0, 0]
    (path / "freemerge.json").unlink()
    (path / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match=r"not a folder that freemerge wrote \(it has no freemerge.json\)"):
        write(path, tensors, overwrite=True)
    assert (path / "thesis.tex").exists()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is not a folder that freemerge wrote"):
        write(tmp_path / "file", tensors, overwrite=True)
    with pytest.raises(CheckpointError, match="cannot be written"):
        write(tmp_path / "file" / "model", tensors)
    assert sorted(os.listdir(tmp_path)) == ["file", "model"]


@pytest.mark.parametrize("swap", [True, False])
def test_a_folder_is_replaced_as_a_whole(tmp_path, tensors, swap, monkeypatch):
    if not swap:
        monkeypatch.setattr(draft_module, "_exchange", lambda first, second: False)
    write(tmp_path / "model", tensors, shard_size=900)
    write(tmp_path / "model", tensors, overwrite=True)
    # No stale shards or index remain, which transformers would load instead of the new file.
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "freemerge.json", "model.safetensors"]
    assert os.listdir(tmp_path) == ["model"]


def test_permissions_are_ordinary(tmp_path, tensors):
    (tmp_path / "plain").mkdir()
    write(tmp_path / "model", tensors)
    assert (tmp_path / "plain").stat().st_mode == (tmp_path / "model").stat().st_mode
    assert open_checkpoint(tmp_path / "model").names
