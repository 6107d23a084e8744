"""The messages in the page on troubleshooting are those of the code."""

from __future__ import annotations

import ast
import re

import pytest

from tests.pages import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^\*\*`+ ?(.*?) ?`+\*\*$", PAGE, re.MULTILINE)


def texts() -> list[str]:
    """Every string in the code, with … for the values that are put into it."""
    found = []
    for folder in ("freemerge", "callbacks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append(
                        "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


@pytest.fixture(scope="module")
def strings() -> str:
    return "\n".join(texts())


def test_the_page_has_the_likely_messages() -> None:
    assert len(MESSAGES) >= 25
    assert len(MESSAGES) == len(re.findall(r"^\*\*", PAGE, re.MULTILINE))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message[:60])
def test_the_code_has_the_message(message: str, strings: str) -> None:
    parts = [re.escape(part) for part in message.split("…")]
    assert re.search("[^\n]*?".join(parts), strings), message
