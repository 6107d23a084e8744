"""Folders that cannot be written are one line before any work, and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from freemerge.cli import main

ROOT = Path(__file__).parent.parent.parent
TINY = str(ROOT / "tests" / "tiny.yaml")


@pytest.mark.parametrize("place", ["a file", "below a file", "no place"])
@pytest.mark.parametrize("setting", ["run.folder", "pretrain.cache"])
def test_a_folder_that_cannot_be_written_is_one_line(setting: str, place: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("mine")
    folder = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "run", "no place": Path("/proc/run")}[
        place
    ]
    settings = {"run.folder": str(tmp_path / "run"), setting: str(folder)}
    arguments = [text for key, value in settings.items() for text in (f"--{key}", value)]
    assert main(["fit", "--config", TINY, *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert f"{folder}: cannot be written (" in said
    assert said.endswith(f"; choose another {setting}")
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "pretrain").exists()
    assert (tmp_path / "file").read_text() == "mine"
