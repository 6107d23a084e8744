"""Every command and every part of a configuration in the pages parses with the options that the program has."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from freemerge.cli import main
from tests.pages import GUIDES, ROOT, block, blocks, commands

TINY = str(ROOT / "tests" / "tiny.yaml")
# A configuration alone is parsed and run by tests/configs.
COMMANDS = sorted(
    {
        tuple(command)
        for page in GUIDES
        for command in commands(page)
        if command[1:2] != ["--config"] or len(command) > 3
    }
)
SETTINGS = [text for page in GUIDES for text in blocks(page, "yaml") if re.match(r"(data|merge|tune):", text)]


@pytest.fixture
def files(tmp_path, monkeypatch) -> None:
    """The files that commands name, in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", "configs")
    shutil.copy("configs/merge.yaml", "merge.yaml")
    Path("their.yaml").write_text(block("docs/how_to/from_mergekit.md", "yaml", "# their.yaml"))
    Path("my.yaml").write_text(block("docs/tutorials/own_data.md", "yaml", "# my.yaml"))


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command)[:60])
def test_every_command_parses(command: tuple[str, ...], capsys) -> None:
    shows = {"--help", "--version", "--method.help", "doctor"} & set(command)
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(main([*command, *([] if shows or command[0] == "advise" else ["--print_config"])]))
    errors = capsys.readouterr().err
    if command[0] == "advise":  # has no --print_config; test_programs runs it on models that are there
        assert errors == "error: base.safetensors: does not exist; check the path\n"
    else:
        assert stop.value.code == 0, errors


@pytest.mark.parametrize("text", SETTINGS, ids=range(len(SETTINGS)))
def test_every_part_of_a_configuration_parses(text: str, tmp_path, capsys) -> None:
    (tmp_path / "part.yaml").write_text(text)
    command = "tune" if text.startswith("tune:") else "fit"
    with pytest.raises(SystemExit) as stop:
        main([command, "--config", TINY, "--config", str(tmp_path / "part.yaml"), "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err


def test_the_pages_have_commands_and_configurations() -> None:
    assert len(COMMANDS) >= 10
    assert len(SETTINGS) >= 4
