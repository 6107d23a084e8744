"""One hash for a set of tensors, independent of the file they are stored in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor

from freemerge.checkpoints.formats.safetensors_files import tensor_bytes


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names (sorted), dtypes, shapes and bytes of tensors.

    The same weights have the same hash in every format, order and memory layout. An open `Checkpoint` is streamed.

    Args:
        tensors: name → tensor, any shape and dtype.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        # Every part is length-prefixed or self-delimiting, so two different sets never hash the same bytes.
        digest.update(f"{len(name)}:{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
