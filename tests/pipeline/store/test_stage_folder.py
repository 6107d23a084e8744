"""Stage folders: skipped when done, resumed when interrupted, emptied when stale, never somebody else's files."""

import json

import pytest

from freemerge.pipeline.store.stage_folder import StageFolder


def test_a_finished_stage_is_recognised_by_its_inputs(tmp_path) -> None:
    stage = StageFolder(tmp_path / "s", "s", {"seed": 0, "data": "x"})
    assert stage.record() is None
    assert stage.begin() is None
    assert stage.record() is None
    stage.finish({"acc": 0.5})
    again = StageFolder(tmp_path / "s", "s", {"data": "x", "seed": 0})  # the order of inputs does not matter
    assert again.record()["results"] == {"acc": 0.5}
    assert again.record()["inputs"] == {"seed": 0, "data": "x"}
    assert StageFolder(tmp_path / "s", "s", {"seed": 1, "data": "x"}).record() is None


def test_an_interrupted_stage_resumes_from_its_last_checkpoint(tmp_path) -> None:
    stage = StageFolder(tmp_path / "s", "s", {"seed": 0})
    stage.begin()
    stage.checkpoints.mkdir()
    (stage.checkpoints / "last.ckpt").touch()
    assert StageFolder(tmp_path / "s", "s", {"seed": 0}).begin() == stage.checkpoints / "last.ckpt"


def test_a_stale_folder_is_emptied(tmp_path) -> None:
    old = StageFolder(tmp_path / "s", "s", {"seed": 0})
    old.begin()
    old.checkpoints.mkdir()
    (old.checkpoints / "last.ckpt").touch()
    old.finish({})
    new = StageFolder(tmp_path / "s", "s", {"seed": 1})
    assert new.begin() is None
    assert sorted(path.name for path in new.path.iterdir()) == ["started.json"]
    assert json.loads((new.path / "started.json").read_text()) == {"key": new.key}


def test_foreign_files_are_not_touched(tmp_path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"/s: holds files that no stage of a run made"):
        StageFolder(tmp_path / "s", "s", {}).begin()
    assert (tmp_path / "s" / "thesis.tex").exists()


def test_a_checkpoint_of_the_callers_is_resumed_from_but_never_deleted(tmp_path) -> None:
    stage = StageFolder(tmp_path / "s", "s", {"seed": 0})
    stage.begin()
    stage.checkpoints.mkdir()
    mine = stage.checkpoints / "best.ckpt"
    mine.touch()
    stage.finish({})
    assert StageFolder(tmp_path / "s", "s", {"seed": 0}).begin(str(mine)) == mine
    stage.finish({})
    with pytest.raises(ValueError, match="about to be redone; move it first"):
        StageFolder(tmp_path / "s", "s", {"seed": 1}).begin(str(mine))
    assert mine.exists()
