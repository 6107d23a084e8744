"""The code blocks of README and of the pages in docs/, for the tests that run them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
BENCHMARKS = sorted((ROOT / "docs" / "benchmarks").glob("*.md"))
GUIDES = sorted([ROOT / "README.md", *(page for page in ROOT.glob("docs/**/*.md") if page not in BENCHMARKS)])
"""The pages for users; those of benchmarks are records of what was run."""


def name_of(page: Path) -> str:
    """A page's path in the repository, for the names of tests."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: str | Path, language: str) -> list[str]:
    """The code blocks of a page, given by its path in the repository, in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def block(page: str | Path, language: str, part: str) -> str:
    """The first code block of a page that contains some text."""
    return next(each for each in blocks(page, language) if part in each)


def commands(page: str | Path) -> list[list[str]]:
    """Every `… -m freemerge …` of a page's shell blocks, as arguments."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    calls = [part for line in lines for part in line.split("&&") if "-m freemerge" in part]
    return [shlex.split(call.partition("-m freemerge")[2]) for call in calls]
