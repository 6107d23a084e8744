"""README begins with the two commands, its commands are run, and its links lead to files."""

import re

import pytest

from tests.pages import ROOT, blocks, commands

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_has_the_two_commands_first() -> None:
    assert blocks("README.md", "bash")[0].splitlines() == [
        'pip install -e ".[quickstart]" && python -m freemerge fit --config configs/quickstart.yaml',
        'pip install -e ".[test]" && pytest',
    ]


def test_readme_has_no_other_commands_than_the_tutorials() -> None:
    """tests/docs runs the tutorials' commands; .ci/run and tests/configs run the quickstart's configuration."""
    pages = ("finished_checkpoints", "language_models", "quickstart")
    run = [command for page in pages for command in commands(f"docs/tutorials/{page}.md")]
    assert [command for command in commands("README.md") if command not in run] == []


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)", README))))
def test_every_file_that_readme_links_to_exists(path: str) -> None:
    assert (ROOT / path).exists()
