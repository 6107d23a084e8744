"""The content of safetensors files, as a hash: equal for equal tensors and metadata, wherever the file is."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from functools import lru_cache
from pathlib import Path


def content_hash(path: Path) -> str:
    """SHA-256 of a file's content, cached as long as its size and time stay the same.

    safetensors writes metadata in an order that differs from one process to the next, so the header counts sorted.
    """
    status = path.stat()
    return _content_hash(path.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _content_hash(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        header = file.read(min(int.from_bytes(file.read(8), "little"), size))
        with suppress(ValueError):  # damaged: the error is raised when the file is read
            header = json.dumps(json.loads(header), sort_keys=True).encode()
        digest = hashlib.sha256(header)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
