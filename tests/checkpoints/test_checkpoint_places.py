"""Paths: the home folder, links that stay links, folders of the Hugging Face cache."""

import os

import pytest
import torch

from freemerge.checkpoints import CheckpointError, expand_name, load_checkpoint, open_checkpoint, save_checkpoint
from freemerge.checkpoints.formats.task_files import read_record
from freemerge.checkpoints.places import landing


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_home_is_the_same_everywhere(home):
    save_checkpoint("~/models/w.safetensors", {"w": torch.ones(2)})
    assert (home / "models" / "w.safetensors").is_file()
    assert load_checkpoint("~/models/w.safetensors")["w"].tolist() == [1, 1]
    assert read_record("~/models/w.safetensors") is None
    with pytest.raises(CheckpointError, match=r"~nobody-here/w: could not determine home directory; write the path"):
        open_checkpoint("~nobody-here/w")


def test_a_link_to_a_file_stays_one(tmp_path):
    target, link = tmp_path / "big" / "v1.safetensors", tmp_path / "current.safetensors"
    save_checkpoint(target, {"w": torch.zeros(2)})
    link.symlink_to(target)
    save_checkpoint(link, {"w": torch.ones(2)})
    assert link.is_symlink()
    assert load_checkpoint(target)["w"].tolist() == [1, 1]
    assert sorted(os.listdir(tmp_path)) == ["big", "current.safetensors"]


def test_where_a_link_leads(tmp_path):
    (tmp_path / "there").symlink_to(tmp_path / "not" / "yet")
    assert landing(tmp_path / "there") == tmp_path / "not" / "yet"
    assert landing(tmp_path / "plain") == tmp_path / "plain"
    (tmp_path / "round").symlink_to(tmp_path / "round")
    with pytest.raises(CheckpointError, match="round: is a link that leads to itself"):
        landing(tmp_path / "round")
    (tmp_path / "w.safetensors").symlink_to(tmp_path / "folder")
    with pytest.raises(CheckpointError, match=r"w.safetensors: is a link to .*/folder, which has another ending"):
        landing(tmp_path / "w.safetensors")


def test_a_folder_of_the_cache_is_its_main_snapshot(tmp_path):
    cache = tmp_path / "models--org--name"
    for value, revision in enumerate(("aaa", "bbb")):
        save_checkpoint(cache / "snapshots" / revision / "model.safetensors", {"w": torch.tensor([float(value)])})
        (cache / "snapshots" / revision / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds 2 snapshots .* give one of them, such as .*/snapshots/aaa"):
        open_checkpoint(cache)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("bbb\n")
    found = open_checkpoint(cache)
    assert found["w"].tolist() == [1]
    assert (found.label, found.folder) == (str(cache), cache / "snapshots" / "bbb")
    (tmp_path / "models--a--b" / "snapshots").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="models--a--b: the cache holds no snapshot"):
        open_checkpoint(tmp_path / "models--a--b")


def test_a_snapshot_whose_blob_is_gone_and_a_folder_of_models(tmp_path):
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to("../blobs/0123")
    with pytest.raises(CheckpointError, match=r"model.safetensors: is a link to ../blobs/0123, which does not exist"):
        open_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    save_checkpoint(folder / "0_Transformer" / "model.safetensors", {"w": torch.ones(1)})
    (folder / "0_Transformer" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no weights in this folder; .* or give one of the folders inside: 0_Tr"):
        open_checkpoint(folder)


def test_a_folder_inside_a_package(tmp_path, monkeypatch) -> None:
    place = tmp_path / "packed_models"
    (place / "small").mkdir(parents=True)
    (place / "__init__.py").write_text("raise RuntimeError('it is found without being imported')")
    save_checkpoint(place / "small" / "model.safetensors", {"weight": torch.ones(2)})
    monkeypatch.syspath_prepend(tmp_path)
    assert expand_name("packed_models:small") == str(place / "small")
    assert open_checkpoint("packed_models:small").tensor("weight").tolist() == [1.0, 1.0]
    for name, message in [
        ("packed_models:large", r"packed_models:large: the package packed_models has no large; its folder is "),
        ("no_such_models:small", r"no_such_models:small: there is no package no_such_models; install it"),
        ("no_such.models:small", r"there is no package no_such\.models"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "packed_models:own").mkdir()
    assert expand_name("packed_models:own") == "packed_models:own"  # a path that exists is a path
