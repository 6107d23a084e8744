"""A run that is killed again and again, moved and extended gives the bits of one that nobody disturbed."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml

from freemerge.cli import main
from freemerge.pipeline.store.contents import content_hash
from tests import processes
from tests.tiny import VIT

ROOT = Path(__file__).parent.parent.parent
TINY = str(ROOT / "tests" / "tiny.yaml")


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A run that draws random numbers in its data, its model and its loss, and keeps the best weights."""
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    config = {
        "trainer": {"max_epochs": 3},
        "model": {"init_args": {"backbone": {"init_args": {"config": {**VIT, **dropout}}}}},
        "data": {"class_path": "tests.pipeline.killed.AugmentedSuite"},
        "merge": {"methods": {"FR": {"class_path": "FRMerging"}}},
        "finetune": {"weights": "best"},
        "experts": {"mixup": 0.2},
        "run": {"checkpoint_steps": 1},
    }
    path = tmp_path / "more.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["fit", "--config", TINY, "--config", str(path), "--run.folder"]


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): content_hash(path) for path in sorted(folder.rglob("*.safetensors"))}


def test_a_killed_moved_and_extended_run_gives_the_bits_of_an_undisturbed_one(tmp_path, arguments) -> None:
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    killed = ["tests/pipeline/killed.py", "4", "7", *arguments, str(tmp_path / "killed")]
    done = processes.run(*killed, "--data.tasks", "[corners]", "--run.stages", "[pretrain, finetune, merge]")
    assert done.returncode == 0, done.stderr
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    shutil.move(tmp_path / "killed", moved)
    assert main([*arguments, str(moved)]) == 0
    assert contents(moved) == contents(tmp_path / "whole")
    assert (moved / "report.json").read_text() == (tmp_path / "whole" / "report.json").read_text()


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, arguments) -> None:
    folder = tmp_path / "run"
    command = ["-m", "freemerge", *arguments, str(folder), "--run.stages", "[pretrain]",
               "--run.checkpoint_steps", "null", "--trainer.max_epochs", "100000"]  # fmt: skip
    fit = processes.Started(*command)
    last = folder / "pretrain" / "checkpoints" / "last.ckpt"
    while not last.exists() and fit.poll() is None:
        time.sleep(0.02)
    fit.send_signal(signal.SIGINT)
    out, err = fit.communicate(timeout=60)
    assert fit.returncode == 130, err
    assert "interrupted: pretrain stopped at step" in err
    assert "the same command continues from there" in err
    assert "Traceback" not in err
    assert "Ctrl-C: stopping after this step" in out
    assert not list(last.parent.glob("*.partial"))
    assert os.path.getsize(last) > 0
