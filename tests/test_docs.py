"""Pages name files and names that exist, and the site lists every page."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pages import BENCHMARKS, GUIDES, ROOT, blocks, name_of
from tools import write_method_pages

PAGES = sorted(
    {*ROOT.glob("docs/**/*.md"), *(ROOT / name for name in ("BENCHMARKS.md", "CONTRIBUTING.md", "README.md"))}
)
PYTHON = [(page, text) for page in GUIDES for text in blocks(page, "python")]


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(((?!http)[^)#]+)", page.read_text(encoding="utf-8"))


def site() -> dict[str, Any]:
    """mkdocs.yml; `!ENV [NAME, default]` becomes its list."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!ENV", lambda loader, node: loader.construct_sequence(node))
    return yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)


def pages_in(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in pages_in(entry)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_to_a_file(page: Path) -> None:
    assert [link for link in links(page) if not (page.parent / link).exists()] == []


def test_the_site_lists_every_page_once() -> None:
    listed = pages_in(site()["nav"])
    own = {page.relative_to(ROOT / "docs").as_posix() for page in ROOT.glob("docs/**/*.md")}
    outer = site()["extra"]["pages"]
    assert own | set(outer.values()) == set(listed), "`nav` in mkdocs.yml must list every page of docs/"
    assert len(listed) == len(set(listed))
    assert all((ROOT / path).is_file() for path in outer)


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


@pytest.mark.parametrize(("page", "text"), PYTHON, ids=lambda value: name_of(value) if isinstance(value, Path) else "")
def test_every_program_imports_names_that_exist(page: Path, text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("freemerge"):
            module = importlib.import_module(node.module or "")
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_the_pages_of_methods_are_up_to_date() -> None:
    """With the docstrings of the classes and the tables of the benchmarks."""
    pages = {name: ROOT / "docs" / "methods" / f"{name}.md" for name in write_method_pages.methods()}
    texts = {name: page.read_text(encoding="utf-8") if page.is_file() else "" for name, page in pages.items()}
    stale = [name for name, text in texts.items() if text != write_method_pages.write_page(name, text or None)]
    assert stale == [], "run `python tools/write_method_pages.py`"
