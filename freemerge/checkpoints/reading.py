"""Bytes of a file, read when they are asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from freemerge.checkpoints.errors import CheckpointError


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
    data = torch.empty(stop - begin, dtype=torch.uint8)
    if stop > begin:
        view = memoryview(data.numpy())
        try:
            # Opened for each read: no handle outlives its use, and a thousand shards need no thousand handles.
            with path.open("rb", buffering=0) as file:
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
