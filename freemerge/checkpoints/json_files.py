"""JSON files of a model folder, which are untrusted: read within bounds, rejected with a one-line error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from freemerge.errors import CheckpointError

_LARGEST = 1 << 28  # bytes; tokenizers with 250,000 tokens take tens of millions
_DEEPEST = 100


def read_object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        CheckpointError: it cannot be read, is too large, or is not an object.
    """
    try:
        if (size := path.stat().st_size) > _LARGEST:
            raise CheckpointError(f"{path}: has {size:,} bytes, too many for a configuration; download it again")
        found = json.loads(path.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except RecursionError:
        raise CheckpointError(f"{path}: is nested too deeply to be read; download it again") from None
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: is not JSON in UTF-8 ({reason}); download it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, expected an object; download it again")
    if _depth(found) > _DEEPEST:
        raise CheckpointError(f"{path}: is nested too deeply to be read; download it again")
    return found


def find_object(path: Path) -> dict[str, Any] | None:
    """Read the object in a JSON file; None if the file is missing or cannot be parsed."""
    try:
        return read_object(path) if path.is_file() else None
    except CheckpointError:
        return None


def _depth(value: object) -> int:
    """The maximum nesting depth of objects and lists, computed without recursion."""
    depth = 0
    level: list[Any] = [value]
    while level and depth <= _DEEPEST:
        depth += 1
        inside = [table.values() if isinstance(table, dict) else table for table in level]
        level = [each for values in inside for each in values if isinstance(each, (dict, list))]
    return depth
