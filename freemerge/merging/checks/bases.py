"""Check that all models have the same base, for models that record a hash of theirs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from freemerge.checkpoints import Checkpoint
from freemerge.checkpoints.base_hashes import find_prefix, hash_base
from freemerge.checkpoints.formats.task_files import parse_record
from freemerge.errors import MergeError


def check_bases(base: Checkpoint, models: Sequence[Checkpoint]) -> None:
    """Require that models that record their base (task files) were fine-tuned from this one.

    It takes a pass over the base if there are such models.

    Args:
        base: the base.
        models: the fine-tuned models.

    Raises:
        MergeError: one was fine-tuned from another base.
    """
    found: dict[tuple, str] = {}
    for model in models:
        record = parse_record(model.metadata, model.label)
        if record is None or not record.dtypes:
            continue
        key = tuple(sorted((name, str(dtype)) for name, dtype in record.dtypes.items()))
        if key not in found:
            found[key] = hash_base(base, record.dtypes)
        if found[key] != record.base_hash and _covers(base, record.dtypes):
            raise MergeError(
                f"{model.label}: the task '{record.task}' was fine-tuned from another base than {base.label} (hash "
                f"{record.base_hash[:12]}…, here {found[key][:12]}…), so the merge would be meaningless; pass its "
                "own base, or "
                "fine-tune it again"
            )


def _covers(base: Checkpoint, module_names: Collection[str]) -> bool:
    """Whether a base has all tensors of a module; if it lacks some, the hash may also cover those."""
    names = base.with_tied_names().names
    prefix = find_prefix(module_names, names)
    return {prefix + name for name in names} >= set(module_names)
