"""The help of a command on Lightning's CLI is built once, and cached until other code is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from freemerge.cli import help_cache, main
from freemerge.cli.help_cache import CommandHelp

SCRIPT = """
import sys
from freemerge.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
assert "torch" not in sys.modules and "lightning" not in sys.modules
sys.exit(code)
"""


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a process that may use it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setattr(help_cache, "is_fresh", lambda: True)
    return tmp_path


def in_another_process(*arguments: str) -> subprocess.CompletedProcess:
    # without the setting that names the environment of `.ci/run`: a FREEMERGE_ variable may set an option
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FREEMERGE_")}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment,
    )


def test_the_cached_help_is_the_same_and_imports_no_large_package(cache, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["validate", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--trainer.max_epochs MAX_EPOCHS" in text
    done = in_another_process("validate", "--help")
    assert (done.returncode, done.stdout, done.stderr) == (0, text, "")
    done = in_another_process("validate", "--experts.densty=0.1")
    assert done.returncode == 2
    assert done.stderr == "error: there is no option '--experts.densty'; did you mean '--experts.density'?\n"


def test_other_code_another_width_and_a_damaged_file_make_the_cache_stale(cache, monkeypatch) -> None:
    described = CommandHelp("help", ["a"], ["a"])
    help_cache.store("fit", described)
    assert help_cache.load("fit") == described
    assert help_cache.load("test") is None
    monkeypatch.setenv("COLUMNS", "70")
    assert help_cache.load("fit") is None
    monkeypatch.setenv("COLUMNS", "90")
    installed = cache / "site"
    (installed / "lightning-9.0.dist-info").mkdir(parents=True)
    (installed / "lightning").mkdir()
    (installed / "lightning" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(installed)
    assert help_cache.load("fit") is None
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    (cache / "freemerge" / "help" / "fit.json").write_text("[")
    assert help_cache.load("fit") is None


def test_a_folder_added_to_sys_path_keeps_the_cache_valid(cache, monkeypatch) -> None:
    before = help_cache._fingerprint()
    (cache / "_vendor" / "tomli-2.0.dist-info").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [*sys.path, str(cache / "_vendor")])  # importing setuptools does this
    assert help_cache._fingerprint() == before


def test_a_changed_source_file_makes_the_cache_stale(cache, monkeypatch) -> None:
    before = help_cache._fingerprint()
    stat = Path.stat

    def later(path: Path, **kwargs) -> os.stat_result:
        status = stat(path, **kwargs)
        if path.name != "settings.py":
            return status
        return os.stat_result((*status[:6], status.st_size + 1, *status[7:]))

    monkeypatch.setattr(Path, "stat", later)
    assert help_cache._fingerprint() != before


def test_a_cache_that_cannot_be_written_is_no_error(cache, monkeypatch) -> None:
    (cache / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "file"))
    help_cache.store("fit", CommandHelp("help", [], []))
    assert help_cache.load("fit") is None


def test_a_process_with_settings_in_its_environment_or_own_classes_is_not_fresh(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "lightning", raising=False)
    monkeypatch.delenv("FREEMERGE_CI_VENV", raising=False)
    assert help_cache.is_fresh()
    monkeypatch.setenv("FREEMERGE_FIT__TRAINER__MAX_EPOCHS", "3")
    assert not help_cache.is_fresh()
    monkeypatch.delenv("FREEMERGE_FIT__TRAINER__MAX_EPOCHS")
    monkeypatch.setitem(sys.modules, "lightning", sys)
    assert not help_cache.is_fresh()


@pytest.mark.parametrize(
    ("word", "unknown"),
    [
        ("--trainer.max_epoch=3", "--trainer.max_epoch"),
        ("--modle", "--modle"),
        ("--model.backbone.pooling=cls", None),
        ("--trainer.callbacks+=X", None),
        ("--trainer.callbacks.monitor=x", None),
        ("--model.help", None),
        ("-c", None),
        ("value", None),
    ],
)
def test_unknown_options_are_found_in_groups_but_not_in_classes(word: str, unknown: str | None) -> None:
    options = ["h", "help", "model", "model.help", "trainer", "trainer.max_epochs", "trainer.callbacks",
               "trainer.callbacks.help"]  # fmt: skip
    assert CommandHelp("", [], options).unknown([word, "x"]) == unknown
