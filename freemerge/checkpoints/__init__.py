"""Named tensors in, named tensors out: every format users have, read lazily, written atomically."""

from freemerge.checkpoints.checkpoint import Checkpoint, TensorSpec
from freemerge.checkpoints.errors import CheckpointError
from freemerge.checkpoints.hashing import hash_tensors
from freemerge.checkpoints.opening import load_checkpoint, open_checkpoint
from freemerge.checkpoints.saving import save_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "TensorSpec",
    "hash_tensors",
    "load_checkpoint",
    "open_checkpoint",
    "save_checkpoint",
]
