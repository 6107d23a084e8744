"""One run at a time in a folder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from freemerge.pipeline.ranks import is_first
from freemerge.pipeline.store.stage_folder import from_rank_zero, make_writable, write_json

_AFTER_A_KILL = 15.0
"""Seconds: loader workers hold their killed parent's lock until they notice that it is gone."""


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; a process that is killed loses it.

    Raises:
        ValueError: if another run is working in the folder, or it cannot be written.
    """
    lock = FileLock(folder / ".lock")

    def acquire() -> None:
        if not is_first():
            return
        make_writable(folder, "run.folder")
        try:
            lock.acquire(timeout=0 if _is_alive(_holder(folder)) else _AFTER_A_KILL)
        except Timeout as error:
            holder = _holder(folder)
            who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
            raise ValueError(
                f"{folder}: {who} is running here; wait for it to end, or choose another run.folder"
            ) from error
        write_json(folder / ".running.json", {"pid": os.getpid(), "host": socket.gethostname()})

    from_rank_zero(acquire)
    try:
        yield
    finally:
        if lock.is_locked:
            (folder / ".running.json").unlink(missing_ok=True)
            lock.release()


def _holder(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / ".running.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _is_alive(holder: dict[str, Any] | None) -> bool:
    """Whether the process may exist; a process on another machine is assumed to exist."""
    if holder is None or holder["host"] != socket.gethostname():
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
