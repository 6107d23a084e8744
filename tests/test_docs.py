"""The pages in docs/ name files that exist, and their indexes list every page."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "BENCHMARKS.md", ROOT / "CONTRIBUTING.md"])
BENCHMARKS = sorted((ROOT / "docs" / "benchmarks").glob("*.md"))


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(((?!http)[^)#]+)", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page: Path) -> None:
    assert [link for link in links(page) if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", BENCHMARKS, ids=lambda page: page.stem)
def test_every_command_names_a_script_or_a_configuration_that_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?:tools|configs|tests)/[\w/]+\.(?:py|yaml)", text))
    assert named or page.stem == "README"
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_indexes_list_every_benchmark() -> None:
    pages = {page.name for page in BENCHMARKS} - {"README.md"}
    assert set(links(ROOT / "docs" / "benchmarks" / "README.md")) - {"../../tools"} == pages
    assert {Path(link).name for link in links(ROOT / "BENCHMARKS.md")} - {"README.md"} == pages
