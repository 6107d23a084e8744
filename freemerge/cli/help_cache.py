"""A cache of the help and the options of the commands on Lightning's CLI.

Building such a parser takes seconds, because it imports PyTorch, Lightning and all configurable classes. The help
depends only on the installed code, so it is kept in the user's cache with a fingerprint of that code. If the
fingerprint differs, or the process has imported classes of its own, the parser is built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

# The packages whose classes and options appear in the help
_DESCRIBED = ("jsonargparse", "lightning", "torch", "torchmetrics", "torchvision", "transformers")
_TERMINAL = ("NO_COLOR", "FORCE_COLOR", "PYTHON_COLORS", "TERM", "COLUMNS")


class CommandHelp(NamedTuple):
    """A command's help and options.

    Args:
        help: the text of `--help`.
        keys: the keys of its options and of their groups.
        options: the names of its options, without dashes.
    """

    help: str
    keys: list[str]
    options: list[str]

    def unknown(self, arguments: Sequence[str]) -> str | None:
        """The first unknown option on a command line; None if all are known.

        Arguments of a configurable class (`--model.backbone`, given `--model`) are left to the parser.
        """
        groups = {name.rpartition(".")[0] for name in self.options if not name.endswith(".help")}
        classes = tuple(f"{name}." for name in self.options if name not in groups)
        for argument in arguments:
            name = argument.partition("=")[0][2:].removesuffix("+")
            if argument.startswith("--") and name and name not in self.options and not name.startswith(classes):
                return argument.partition("=")[0]
        return None


def is_fresh() -> bool:
    """Whether the cache may be used: no custom classes are imported, and no FREEMERGE_ variable is set."""
    return "lightning" not in sys.modules and not any(name.startswith("FREEMERGE_") for name in os.environ)


def load(command: str) -> CommandHelp | None:
    """The cached help and options of a command; None if there are none, or the installed code has changed."""
    try:
        cached = json.loads(_path(command).read_text(encoding="utf-8"))
        if cached.pop("fingerprint") != _fingerprint():
            return None
        return CommandHelp(**cached)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
    ):  # missing, unreadable, or of another format
        return None


def store(command: str, described: CommandHelp) -> None:
    """Cache a command's help and options; does nothing if the cache cannot be written."""
    with suppress(OSError, RuntimeError):
        path = _path(command)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(json.dumps({"fingerprint": _fingerprint(), **described._asdict()}), encoding="utf-8")
        os.replace(draft, path)


def _path(command: str) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "freemerge" / "help" / f"{command}.json"


def _fingerprint() -> str:
    """A hash of the installed code and of everything that the layout of the help depends on."""
    # Not all of sys.path: setuptools, for example, adds a folder to it when it is imported.
    specs = [spec for name in _DESCRIBED if (spec := PathFinder.find_spec(name)) is not None]
    folders = {Path(folder).parent for spec in specs for folder in spec.submodule_search_locations or ()}
    installed = sorted(str(path) for folder in folders for path in folder.glob("*.dist-info"))
    sources = []
    for package in ("freemerge", "freemerge_callbacks"):
        spec = find_spec(package)
        folder = Path(str(spec.origin) if spec is not None else "").parent
        for path in sorted(folder.rglob("*.py")):
            status = path.stat()
            sources.append((str(path), status.st_size, status.st_mtime_ns))
    shown = [os.environ.get(name) for name in _TERMINAL]
    layout = (shutil.get_terminal_size().columns, sys.stdout.isatty(), shown)
    return hashlib.sha256(repr((sys.version, installed, sources, layout)).encode()).hexdigest()
