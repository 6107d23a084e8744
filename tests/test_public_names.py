"""Rooms, callbacks and tools use of other rooms what everybody may: names that these export, and nothing deeper.

Two exceptions: `tensors` and `runtime` are toolboxes, whose modules are imported by name; and the merging engine, which
reads every kind of file, imports modules of `checkpoints`.
"""

import ast
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("callbacks/freemerge_callbacks", "tools")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
ROOM_FILES = sorted((ROOT / "freemerge").rglob("*/*.py"))
TOOLBOXES = {"tensors", "runtime"}


def imports(path):
    """(module, name) of each import from freemerge in a file; the name is None for a whole module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "freemerge":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.partition(".")[0] == "freemerge")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_exported_names_are_imported(path):
    for module, name in imports(path):
        assert module.count(".") <= 1, f"{module} is inside a room; import from {'.'.join(module.split('.')[:2])}"
        if name is None or module == "freemerge":
            continue
        room = import_module(module)
        exported = getattr(room, "__all__", [each for each in vars(room) if not each.startswith("_")])
        assert name in exported, f"{module} does not export {name}"
        getattr(room, name)


@pytest.mark.parametrize("path", ROOM_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_are_imported_by_their_exports(path):
    own = path.relative_to(ROOT / "freemerge").parts[0]
    for module, name in imports(path):
        _, room, *inside = [*module.split("."), ""]
        if room in ("", own, *TOOLBOXES) or (own == "merging" and room == "checkpoints") or own == "testing":
            continue
        assert inside == [""], f"{module} is inside the room {room}; export {name} from freemerge.{room}"
        assert name is None or not name.startswith("_"), f"{module}.{name} is private"


def test_the_checks_see_imports():
    assert sum(1 for path in FILES for _ in imports(path)) > 60
