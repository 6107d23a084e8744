"""`freemerge doctor` names what is installed and what is not."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest
import torch

from freemerge.cli import doctor, main

LINES = ["torch>=2.4", "peft>=0.18; extra == 'peft'", "made-up[x]>=1; extra == 'tune'", "pytest>=8; extra == 'test'"]


def test_versions_extras_and_devices(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "requires", lambda _: LINES)
    versions = {"torch": torch.__version__, "peft": "0.21.0"}

    def find(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor, "version_of", find)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("freemerge ")
    assert lines[1].startswith("Python 3.")
    assert f"  torch {torch.__version__}" in lines
    assert lines[lines.index("extra peft:") + 1] == "  peft 0.21.0"
    assert lines[lines.index("extra tune:") + 1] == "  made-up is not installed; made-up>=1 is wanted"
    assert not any("pytest" in line for line in lines)
    assert lines[lines.index("devices:") + 1].startswith("  cpu, ")
    versions.pop("torch")
    assert main(["doctor"]) == 2
    assert "a needed package is missing" in capsys.readouterr().err


def test_it_has_no_options(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--method", "x"])
    assert stop.value.code == 2
    assert "there is no option '--method'" in capsys.readouterr().err
