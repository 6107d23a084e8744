"""The help and the options of a command on Lightning's CLI, remembered from the last time its parser was built.

Building the parser takes seconds, as it imports PyTorch, Lightning and all classes that can be configured. What it says
depends on installed code alone, so it is kept in the user's cache, under a fingerprint of that code. With any other
fingerprint, and in a process that has imported classes of its own, the parser is built anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

_SHOWN_BY = ("NO_COLOR", "FORCE_COLOR", "PYTHON_COLORS", "TERM", "COLUMNS")


class Said(NamedTuple):
    """A command's help, and the options that it has.

    Args:
        help: the text of `--help`.
        keys: the keys of its options, and of the groups that they are in.
        options: the names of its options, without dashes.
    """

    help: str
    keys: list[str]
    options: list[str]

    def unknown(self, words: Sequence[str]) -> str | None:
        """The first option among the words that the parser does not know; None if there is none.

        A class's own arguments (`--model.backbone`, where there is `--model`) are left to the parser.
        """
        groups = {name.rpartition(".")[0] for name in self.options if not name.endswith(".help")}
        classes = tuple(f"{name}." for name in self.options if name not in groups)
        for word in words:
            name = word.partition("=")[0][2:].removesuffix("+")
            if word.startswith("--") and name and name not in self.options and not name.startswith(classes):
                return word.partition("=")[0]
        return None


def is_fresh() -> bool:
    """Whether this process can only have the classes that are installed, and takes no settings from its environment."""
    return "lightning" not in sys.modules and not any(name.startswith("FREEMERGE_") for name in os.environ)


def recall(command: str) -> Said | None:
    """What is remembered of a command; None if nothing is, or other code is installed now."""
    try:
        kept = json.loads(_path(command).read_text(encoding="utf-8"))
        if kept.pop("fingerprint") != _fingerprint():
            return None
        return Said(**kept)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):  # not there, or not ours
        return None


def remember(command: str, said: Said) -> None:
    """Keep what a command's parser says; where the cache cannot be written, nothing is kept."""
    with suppress(OSError, RuntimeError):
        path = _path(command)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(json.dumps({"fingerprint": _fingerprint(), **said._asdict()}), encoding="utf-8")
        os.replace(draft, path)


def _path(command: str) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "freemerge" / "help" / f"{command}.json"


def _fingerprint() -> str:
    """Of the code that is installed, and of what else a help's layout depends on."""
    installed = sorted(path.name for folder in sys.path for path in Path(folder).glob("*.dist-info"))
    sources = []
    for package in ("freemerge", "freemerge_callbacks"):
        spec = find_spec(package)
        folder = Path(str(spec.origin) if spec is not None else "").parent
        for path in sorted(folder.rglob("*.py")):
            status = path.stat()
            sources.append((str(path), status.st_size, status.st_mtime_ns))
    shown = [os.environ.get(name) for name in _SHOWN_BY]
    layout = (shutil.get_terminal_size().columns, sys.stdout.isatty(), shown)
    return hashlib.sha256(repr((sys.version, installed, sources, layout)).encode()).hexdigest()
