"""Text files are UTF-8 on every machine: no file is opened in the encoding of a locale."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "freemerge").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")])


def _without_encoding(source: str) -> list[int]:
    """Lines of calls of `read_text`, `write_text` and `open(…, mode)` of a file as text that leave the encoding open.

    A method `open` without a mode is not a file's, or reads bytes: none of the package opens a path so.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(word.arg in ("encoding", None) for word in node.keywords):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = [*node.args, *(word.value for word in node.keywords if word.arg == "mode")]
        modes = [each.value for each in given if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        built_in = isinstance(node.func, ast.Name)
        as_text = any(set(mode) <= set("rwax+t") for mode in modes) or (built_in and len(given) == 1)
        if called in ("read_text", "write_text") or (called == "open" and as_text):
            found.append(node.lineno)
    return found


def test_calls_without_an_encoding_are_found() -> None:
    lines = ["p.read_text()", "p.open('w')", "open(p)", "open(p, 'r')", "p.write_text(t)", "p.open(mode='a')"]
    assert _without_encoding("\n".join(lines)) == [1, 2, 3, 4, 5, 6]
    assert not _without_encoding("p.open('rb')\nopen(p, 'wb')\nopen(p, encoding='utf-8')\ndraft.open()\nopen(p, **kw)")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_file_is_opened_as_utf_8(path: Path) -> None:
    assert _without_encoding(path.read_text(encoding="utf-8")) == []
