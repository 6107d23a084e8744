"""A draft replaces the output completely or not at all, and can be resumed."""

import os

import pytest
import torch

from freemerge.checkpoints import CheckpointError, TensorSpec, load_checkpoint
from freemerge.checkpoints.writing import draft as draft_module
from freemerge.checkpoints.writing.draft import Draft

A, B = torch.arange(6.0).view(2, 3), torch.tensor([True, False])
SHARDS = {"m.safetensors": {"a": TensorSpec((2, 3), torch.float32), "b": TensorSpec((2,), torch.bool)}}


@pytest.fixture
def draft(tmp_path):
    draft = Draft(tmp_path / "m.safetensors", SHARDS)
    yield draft
    draft.close()


def test_values_come_in_any_order(tmp_path, draft):
    draft.begin("key")
    draft.write("a", 4, A.view(-1)[4:])
    draft.write("b", 0, B)
    draft.write("a", 0, A.view(-1)[:4])
    draft.flush()
    assert not (tmp_path / "m.safetensors").exists()
    draft.commit()
    loaded = load_checkpoint(tmp_path / "m.safetensors")
    assert torch.equal(loaded["a"], A)
    assert torch.equal(loaded["b"], B)
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_two_writers(tmp_path, draft):
    draft.begin("key")
    other = Draft(tmp_path / "m.safetensors", SHARDS, writer=1)
    other.write("b", 0, B)
    other.flush()
    other.close()
    draft.write("a", 0, A)
    draft.flush()
    draft.commit()
    assert torch.equal(load_checkpoint(tmp_path / "m.safetensors")["b"], B)


def test_missing_and_repeated_tensors_are_errors(draft):
    draft.begin("key")
    draft.write("a", 0, A.view(-1)[:5])
    with pytest.raises(ValueError, match="the tensor 'a' were written twice"):
        draft.write("a", 4, A.view(-1)[4:])
    with pytest.raises(ValueError, match=r"the tensor 'b' is .*torch.bool.*, got 2 × torch.float32"):
        draft.write("b", 0, torch.ones(2))
    with pytest.raises(ValueError, match=r"got 3 × torch.bool"):
        draft.write("b", 0, torch.ones(3).bool())
    draft.flush()
    with pytest.raises(ValueError, match="the tensor 'a' was not written"):
        draft.commit()


def test_an_interrupted_draft_is_taken_up_again(tmp_path, draft, monkeypatch):
    monkeypatch.setattr(draft_module, "_NOTED", 1)
    draft.begin("key")
    draft.write("b", 0, B)
    draft.write("a", 0, A.view(-1)[:5])  # never finished
    draft.close()  # as a kill leaves it
    with pytest.raises(CheckpointError, match=r"m.safetensors.partial: an interrupted merge with other inputs"):
        Draft(tmp_path / "m.safetensors", SHARDS).begin("other key", resume=True)
    again = Draft(tmp_path / "m.safetensors", SHARDS, writer=2)
    again.begin("key", resume=True)
    again.open()
    assert again.finished == {"b"}
    again.write("a", 0, A)
    again.flush()
    again.commit()
    loaded = load_checkpoint(tmp_path / "m.safetensors")
    assert torch.equal(loaded["a"], A)
    assert torch.equal(loaded["b"], B)


def test_without_resume_an_interrupted_draft_is_removed(tmp_path, draft):
    draft.begin("key")
    draft.write("b", 0, B)
    draft.flush()
    draft.close()
    again = Draft(tmp_path / "m.safetensors", SHARDS)
    again.begin("key")
    again.open()
    assert again.finished == set()
    again.discard()
    assert os.listdir(tmp_path) == []


def test_a_second_writer_is_refused(tmp_path, draft):
    draft.begin("key")
    with pytest.raises(CheckpointError, match=r"m.safetensors: another process is writing it now"):
        Draft(tmp_path / "m.safetensors", SHARDS).begin("key")
    draft.write("a", 0, A)  # unharmed
    draft.write("b", 0, B)
    draft.flush()
    draft.commit()


def test_a_disk_that_is_too_small_says_so_at_once(tmp_path, draft, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match=r"m.safetensors: cannot be written: No space left on device"):
        draft.begin("key")
    assert os.listdir(tmp_path) == []
