"""Bytes of a file, read when they are asked for."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from freemerge.checkpoints.errors import CheckpointError
from freemerge.checkpoints.pages import fresh

_MOST_HANDLES = 64  # a thousand shards need no thousand handles
_kept = threading.local()


@contextmanager
def keep_files_open() -> Iterator[None]:
    """Within it this thread keeps files open from one read to the next; else every read opens its file."""
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
    """The bytes `begin` to `stop` of a file, in fresh memory.

    Args:
        path: the file.
        begin: position of the first byte.
        stop: position after the last.
        name: the tensor that they belong to, for messages.

    Returns:
        (stop − begin,) uint8.

    Raises:
        CheckpointError: the file vanished or got shorter since it was opened.
    """
    data = fresh((stop - begin,), torch.uint8)
    if stop > begin:
        view = memoryview(data.numpy())
        try:
            with _opened(path) as file:
                file.seek(begin)
                done = 0
                while done < len(view):  # one read returns at most 2 GiB
                    count = file.readinto(view[done:])
                    if not count:
                        raise CheckpointError(
                            f"{path}: ended inside the tensor '{name}': the file changed while it was read"
                        )
                    done += count
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    return data


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    files: OrderedDict[str, BinaryIO] | None = getattr(_kept, "files", None)
    if files is None:
        with path.open("rb", buffering=0) as file:
            yield file
        return
    key = os.fspath(path)
    file = files.pop(key, None) or path.open("rb", buffering=0)
    files[key] = file  # the last used at the end
    if len(files) > _MOST_HANDLES:
        files.popitem(last=False)[1].close()
    yield file
