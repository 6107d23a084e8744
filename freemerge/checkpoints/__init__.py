"""Checkpoints: named tensors, read lazily from every common format and written atomically."""

from freemerge.checkpoints.base_hashes import find_prefix, hash_base
from freemerge.checkpoints.checkpoint import Checkpoint, TensorSpec
from freemerge.checkpoints.formats.task_files import TaskRecord, read_record, write_task_file
from freemerge.checkpoints.hashing import hash_tensors
from freemerge.checkpoints.hub import locate
from freemerge.checkpoints.memory import find_tied
from freemerge.checkpoints.opening import load_checkpoint, open_checkpoint
from freemerge.checkpoints.places import expand, expand_name
from freemerge.checkpoints.publishing import check_repository, push_folder
from freemerge.checkpoints.writing.folder import check_folder, read_origin
from freemerge.checkpoints.writing.saving import save_checkpoint
from freemerge.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "TaskRecord",
    "TensorSpec",
    "check_folder",
    "check_repository",
    "expand",
    "expand_name",
    "find_prefix",
    "find_tied",
    "hash_base",
    "hash_tensors",
    "load_checkpoint",
    "locate",
    "open_checkpoint",
    "push_folder",
    "read_origin",
    "read_record",
    "save_checkpoint",
    "write_task_file",
]
