"""The workflows and issue templates are valid YAML, run scripts that exist, and store no secret."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def load(path: Path) -> dict[str, Any]:
    return yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)  # `on` stays a string


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_whole(path: Path) -> None:
    workflow = load(path)
    assert workflow["on"]
    assert workflow["permissions"] == {"contents": "read"}  # a job that writes says so itself
    names = set(workflow["jobs"])
    for job in workflow["jobs"].values():
        assert job["runs-on"] == "ubuntu-latest"
        assert {job["needs"]} <= names if "needs" in job else True
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            for script in re.findall(r"bash (\S+)", step.get("run", "")):
                assert (ROOT / script).is_file()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_needs_no_secret(path: Path) -> None:
    assert "secrets." not in path.read_text(encoding="utf-8")


def test_the_pythons_are_those_of_the_package() -> None:
    supported = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    tried = [
        load(path)["jobs"][job]["strategy"]["matrix"]["python"]
        for path, job in zip(WORKFLOWS[::2], ("checks", "try"), strict=True)
    ]
    assert [path.stem for path in WORKFLOWS] == ["ci", "docs", "release"]
    assert tried == [supported, supported]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_asks_for_something(path: Path) -> None:
    form = load(path)
    assert form["name"]
    assert form["description"]
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in asked}) == len(asked)
    assert any(field.get("validations", {}).get("required") == "true" for field in asked)


def test_the_documentation_is_built_with_what_the_extra_installs() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extra = re.search(r"^docs = \[(.*?)\]\s*#", text, re.MULTILINE)
    assert extra is not None
    wanted = {name for name in re.findall(r'"([^"]+)"', extra[1]) if not name.startswith("ruff")}
    for step in load(WORKFLOWS[1])["jobs"]["build"]["steps"]:
        if "pip install" in step.get("run", ""):
            assert wanted <= set(re.findall(r'"([^"]+)"', step["run"]))
