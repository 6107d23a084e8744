"""Named tensors in, named tensors out: every format users have, read lazily, written atomically."""

from freemerge.checkpoints.checkpoint import Checkpoint, TensorSpec
from freemerge.checkpoints.hashing import hash_tensors
from freemerge.checkpoints.opening import load_checkpoint, open_checkpoint
from freemerge.checkpoints.writing.saving import save_checkpoint
from freemerge.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "TensorSpec",
    "hash_tensors",
    "load_checkpoint",
    "open_checkpoint",
    "save_checkpoint",
]
