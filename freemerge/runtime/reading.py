"""Lazy reads of byte ranges of a file."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from freemerge.errors import CheckpointError
from freemerge.runtime.pages import fresh

_MOST_HANDLES = 64  # bounds the open files for models with many shards
_kept = threading.local()


@contextmanager
def keep_files_open() -> Iterator[None]:
    """A context in which this thread keeps files open between reads; outside it, every read opens its file."""
    if getattr(_kept, "files", None) is not None:
        yield
        return
    _kept.files = OrderedDict()
    try:
        yield
    finally:
        for file in _kept.files.values():
            file.close()
        _kept.files = None


def read_bytes(path: Path, begin: int, stop: int, name: str) -> Tensor:
    """Read the bytes `begin` to `stop` of a file into fresh memory.

    Args:
        path: the file.
        begin: position of the first byte.
        stop: position after the last.
        name: the tensor that the bytes belong to, for messages.

    Returns:
        (stop − begin,) uint8.

    Raises:
        CheckpointError: the file vanished or got shorter since it was opened.
    """
    data = fresh((stop - begin,), torch.uint8)
    if stop > begin:
        files: OrderedDict[str, FileIO] | None = getattr(_kept, "files", None)
        try:
            if files is None:
                with path.open("rb", buffering=0) as file:
                    complete = _fill(data, file, begin)
            else:
                complete = _fill(data, _kept_open(files, path), begin)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
        if not complete:
            raise CheckpointError(f"{path}: ended inside the tensor '{name}': the file changed while it was read")
    return data


def _fill(data: Tensor, file: FileIO, begin: int) -> bool:
    """Fill a buffer with the bytes of a file from `begin` on; False if the file ends first."""
    view, done = data.numpy().data, 0
    file.seek(begin)
    while done < len(view):  # one read returns at most 2 GiB
        count = file.readinto(view[done:])
        if not count:
            return False
        done += count
    return True


def _kept_open(files: OrderedDict[str, FileIO], path: Path) -> FileIO:
    """The file's handle, from those that this thread keeps open."""
    key = os.fspath(path)
    if key in files:
        files.move_to_end(key)
        return files[key]
    files[key] = path.open("rb", buffering=0)
    if len(files) > _MOST_HANDLES:
        files.popitem(last=False)[1].close()
    return files[key]
