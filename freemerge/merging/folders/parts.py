"""The companions of the models' weights, and the parts of models with separate weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from freemerge.checkpoints import Checkpoint, open_checkpoint
from freemerge.checkpoints.companions import Companions, find_companions, top_companions
from freemerge.checkpoints.opening import WEIGHT_FILES

_NONE = Companions({}, [], [], [])


def companions_of(places: Sequence[Path | None], checkpoints: Sequence[Checkpoint]) -> list[Companions]:
    """List the companions of each model that has a configuration.

    Args:
        places: the path of each model, which may lie inside another's; None for a model in memory.
        checkpoints: the same models, opened.

    Raises:
        CheckpointError: a folder cannot be read.
    """
    apart = [path for path in places if path is not None]
    return [
        _NONE
        if checkpoint.folder is None
        else find_companions(checkpoint.folder, apart)
        if path is None or path.is_dir() or path.name in WEIGHT_FILES
        else top_companions(checkpoint.folder)
        for path, checkpoint in zip(places, checkpoints, strict=True)
    ]


def join_modules(
    base: Checkpoint, models: Sequence[Checkpoint], modules: Sequence[Sequence[str]]
) -> tuple[Checkpoint, tuple[Checkpoint, ...]]:
    """Join the models with their parts that have separate weights, whose tensors are named `2_Dense/linear.weight`.

    A fine-tuned model without a part that the base has is treated as not having changed it.

    Args:
        base: the pretrained model.
        models: the fine-tuned models.
        modules: for the base and then for each model: the subfolders that hold a part.

    Raises:
        CheckpointError: the weights of a part cannot be opened.
    """
    own, *others = (
        {name: _open_part(checkpoint, name) for name in names}
        for checkpoint, names in zip((base, *models), modules, strict=True)
    )
    joined = []
    for model, parts in zip(models, others, strict=True):
        whole = model
        for part in parts.values():
            whole = whole.joined(part)
        source = whole.source
        for name, part in own.items():
            whole = whole if name in parts else whole.joined(part)
        whole.source = source
        joined.append(whole)
    for part in own.values():
        base = base.joined(part)
    return base, tuple(joined)


def describe_parts(models: Sequence[Companions]) -> str | None:
    """One line about parts of fine-tuned models that only a folder can store; None if there are none."""
    names = list(dict.fromkeys(f"{module}/" for model in models for module in model.modules))
    if not names:
        return None
    return f"the weights in {', '.join(names[:10])} are not part of the result; write a folder to merge them"


def _open_part(checkpoint: Checkpoint, name: str) -> Checkpoint:
    assert checkpoint.folder is not None  # its parts were listed with it
    return open_checkpoint(checkpoint.folder / name, label=f"{checkpoint.label}/{name}").under(f"{name}/")
