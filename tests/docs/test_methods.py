"""Every merging method has a page; tests/test_docs.py checks that its generated parts are up to date."""

from __future__ import annotations

import re

import pytest

from tests.pages import ROOT
from tools import write_method_pages as tool

FOLDER = ROOT / "docs" / "methods"


def test_every_method_has_a_page_and_a_row() -> None:
    names = set(tool.methods())
    assert {page.stem for page in FOLDER.glob("*.md")} == names | {"README"}
    assert set(re.findall(r"\]\((\w+)\.md\)", (FOLDER / "README.md").read_text(encoding="utf-8"))) >= names


@pytest.mark.parametrize("name", tool.methods())
def test_a_page_says_when_to_use_the_method(name: str) -> None:
    assert "\n## When to use it\n" in (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def test_a_page_states_the_numbers_of_the_benchmarks() -> None:
    rows = (ROOT / "docs" / "benchmarks" / "vision8_vit.md").read_text(encoding="utf-8").splitlines()
    average = next(row for row in rows if row.startswith("| TIES |")).split("|")[4].strip()
    assert f"{average} % (base" in tool.measured("Ties")
    assert "do not cover" in tool.measured("NearSwap")


def test_a_page_without_the_comments_is_refused() -> None:
    with pytest.raises(ValueError, match="no part between `<!-- head -->` and `<!-- end -->`"):
        tool.write_page("Ties", "# TIES\n")
