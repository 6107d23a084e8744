"""Runs that can be trusted: keyed by what is read, never overwritten by accident, extended and moved."""

import json
import shutil
from pathlib import Path

import pytest

from freemerge.checkpoints import load_checkpoint, save_checkpoint
from freemerge.cli import main
from freemerge.pipeline.store.lock import only_run

TINY = str(Path(__file__).parent.parent / "tiny.yaml")


def fit(folder: Path, *options: str) -> int:
    return main(["fit", "--config", TINY, "--run.folder", str(folder), *options])


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Path → time and content, of all files."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("stage.json")}


def error(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_a_finished_base_is_the_runs_own_wherever_the_command_is_given(tmp_path, monkeypatch, capsys) -> None:
    """The cache, told relatively, is another one elsewhere, and has another backbone of the same key."""
    options = ("--pretrain.cache", "kept", "--run.stages", "[pretrain, finetune]")
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert fit(tmp_path / "run", *options) == 0
    (entry,) = (tmp_path / "here" / "kept").iterdir()
    shutil.copytree(entry, tmp_path / "there" / "kept" / entry.name)
    other = tmp_path / "there" / "kept" / entry.name / "base.safetensors"
    save_checkpoint(other, {name: 2 * tensor for name, tensor in load_checkpoint(other).items()})
    before = files(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "there")
    capsys.readouterr()
    assert fit(tmp_path / "run", *options) == 0
    assert "pretrain: done already" in capsys.readouterr().out
    assert {name: before[name] for name in before if "config" not in name} == {
        name: entry for name, entry in files(tmp_path / "run").items() if "config" not in name
    }


def test_another_run_copies_the_base_from_the_cache(tmp_path, capsys) -> None:
    options = ("--pretrain.cache", str(tmp_path / "kept"), "--run.stages", "[pretrain]")
    assert fit(tmp_path / "first", *options) == 0
    capsys.readouterr()
    assert fit(tmp_path / "second", *options) == 0
    assert "pretrain: taken from" in capsys.readouterr().out
    bases = [(tmp_path / name / "base.safetensors").read_bytes() for name in ("first", "second")]
    assert bases[0] == bases[1]


def test_a_deleted_base_that_is_reproduced_keeps_the_results_made_from_it(copy: Path) -> None:
    before = times(copy)
    (copy / "base.safetensors").unlink()
    shutil.rmtree(copy / "pretrain")
    assert fit(copy) == 0
    assert {name for name, moment in times(copy).items() if moment != before[name]} == {"pretrain/stage.json"}


def test_experts_whose_extraction_is_reproduced_are_not_trained_again(copy: Path) -> None:
    """safetensors writes metadata in another order each time: what counts is what they say."""
    before = times(copy)
    for stage in ("merge", "extracted"):
        shutil.rmtree(copy / stage)
    assert fit(copy) == 0
    redone = {name for name, moment in times(copy).items() if moment != before[name]}
    assert redone == {"merge/stage.json", "extracted/stage.json"}


def test_a_changed_base_is_refused_for_models_tuned_from_the_old_one(copy: Path, capsys) -> None:
    base = copy / "base.safetensors"
    save_checkpoint(base, {name: 2 * tensor for name, tensor in load_checkpoint(base).items()})
    before = files(copy)
    assert fit(copy) == 2
    message = error(capsys)
    for part in ("finished results would be replaced", "finetune corners, finetune bars", "base has changed"):
        assert part in message
    assert "--run.overwrite true" in message
    assert files(copy) == before


def test_a_further_task_is_tuned_and_the_others_are_left_alone(run: Path, tmp_path) -> None:
    assert fit(tmp_path, "--data.tasks", "[corners]", "--run.stages", "[pretrain, finetune, merge]") == 0
    before = times(tmp_path)
    assert fit(tmp_path) == 0
    after = times(tmp_path)
    assert {name for name in before if after[name] == before[name]} == {
        "pretrain/stage.json", "finetune/corners/stage.json",
    }  # fmt: skip
    assert (tmp_path / "report.json").read_text() == (run / "report.json").read_text()


def test_fewer_tasks_do_not_replace_the_merge_of_all(copy: Path, capsys) -> None:
    before = files(copy)
    assert fit(copy, "--data.tasks", "[bars]") == 2
    assert "merge, experts extracted" in error(capsys)
    assert files(copy) == before


def test_a_changed_setting_says_what_it_would_replace(copy: Path, capsys) -> None:
    before = files(copy)
    assert fit(copy, "--model.label_smoothing", "0.2") == 2
    message = error(capsys)
    assert "finetune corners, finetune bars (model.label_smoothing: 0 → 0.2)" in message
    assert "merge (made from finetune corners)" in message
    assert "router" not in message  # it looks at images alone
    assert files(copy) == before
    assert fit(copy, "--model.label_smoothing", "0.2", "--run.stages", "[router]") == 0  # which that does not touch


def test_a_fit_that_was_begun_is_not_thrown_away_either(copy: Path, capsys) -> None:
    stage = copy / "finetune" / "bars" / "stage.json"
    (stage.parent / "started.json").write_text(json.dumps({"key": json.loads(stage.read_text())["key"]}))
    stage.unlink()
    assert fit(copy, "--model.label_smoothing", "0.2") == 2
    assert "finetune bars (a fit that was begun with other settings)" in error(capsys)


def test_a_change_of_device_is_not_a_changed_setting(copy: Path) -> None:
    before = times(copy)
    assert fit(copy, "--finetune.trainer", "{accelerator: cpu, enable_progress_bar: false}") == 0
    assert times(copy) == before


def test_a_folder_of_an_earlier_version_is_named_as_such(copy: Path, capsys) -> None:
    for path in copy.rglob("stage.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**{key: record[key] for key in record if key != "files"}, "key": "0" * 64}))
    assert fit(copy) == 2
    assert "made by an earlier version of freemerge" in error(capsys)


def test_a_run_that_was_moved_is_done_already(copy: Path, run: Path, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "deep").mkdir()
    moved = copy.rename(tmp_path / "deep" / "moved")
    before = times(moved)
    monkeypatch.chdir(moved.parent)
    assert fit(Path("moved")) == 0
    assert times(moved) == before
    assert (moved / "report.json").read_text() == (run / "report.json").read_text()


def test_fast_dev_run_runs_everything_and_writes_nothing(copy: Path, tmp_path, capsys) -> None:
    before = files(copy)
    assert fit(copy, "--trainer.fast_dev_run", "true", "--pretrain.cache", str(tmp_path / "kept")) == 0
    assert "router accuracy" in capsys.readouterr().out
    assert files(copy) == before
    assert not (tmp_path / "kept").exists()
    assert fit(tmp_path / "new", "--trainer.fast_dev_run", "true", "--run.stages", "[pretrain]") == 0
    assert not (tmp_path / "new").exists()


def test_a_second_run_in_the_same_folder_is_refused(copy: Path, capsys) -> None:
    before = files(copy)
    with only_run(copy):
        assert fit(copy) == 2
    assert "is running here; wait for it to end, or choose another run.folder" in error(capsys)
    assert files(copy) == before


def test_a_finished_search_is_not_replaced_by_one_of_other_settings(copy: Path, capsys) -> None:
    tune = ["tune", "--config", TINY, "--run.folder", str(copy), "--tune.trials", "2"]
    assert main(tune) == 0
    before = files(copy / "tune")
    assert main([*tune, "--tune.goal", "worst"]) == 2
    assert "a finished search would be replaced (goal: mean → worst)" in error(capsys)
    assert files(copy / "tune") == before
    assert main([*tune, "--tune.goal", "worst", "--run.overwrite", "true"]) == 0
