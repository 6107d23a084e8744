"""Conversion of fine-tuned models to the tensor names of their base.

Most models have the base's names, possibly under a prefix. Otherwise, base and model are converted to the names of the
modules that a `config.json` describes, and from these to the base's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence, Set
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from freemerge.checkpoints import Checkpoint, CheckpointError
from freemerge.checkpoints.architecture import CONFIG, Architecture, read_architecture
from freemerge.checkpoints.json_files import read_object
from freemerge.checkpoints.naming.modules import to_modules

_BARE = re.compile(r"(?!.*Heads?Model)\w+Model")  # classes of models without a head

Find = Callable[[Checkpoint], Sequence[Any]]
Read = Callable[[Path | None], Architecture | None]


class Aligned(NamedTuple):
    """Fine-tuned models under the base's names; adapters are not bound to the base yet."""

    models: tuple[Checkpoint, ...]
    possible: Set[str] = frozenset()  # tensors of the base's model, even if its files lack them, as far as known
    problem: str | None = None  # why module names could not be determined, if they were needed


def align(base: Checkpoint, models: Sequence[Checkpoint], misfits: Find) -> Aligned:
    """Convert models to the base's names.

    Args:
        base: the pretrained model.
        models: the fine-tuned models.
        misfits: returns the tensors of a model that do not fit the base.

    Raises:
        CheckpointError: see `Checkpoint.relative_to`.
    """
    read = cache(read_architecture)
    aligned: list[Checkpoint] = []
    possible: Set[str] = frozenset()
    problem: str | None = None
    for model in models:
        best = model.relative_to(base.names)
        count = _count(misfits, best)
        try:
            for architecture in _architectures(base, model, read) if any(count) or _may_lose(base, best) else ():
                if architecture.path.parent == base.folder:
                    possible = architecture.tensors.keys()
                found = _through_modules(architecture, base, model)
                if (left := _count(misfits, found)) < count or _has_more(architecture, base, best, found):
                    best, count = found, left
                if not any(count):
                    break
        except CheckpointError as error:
            problem = str(error)
        aligned.append(best)
    return Aligned(tuple(aligned), possible, problem)


def _count(misfits: Find, model: Checkpoint) -> tuple[int, int]:
    """The number of tensors that do not fit, and of those that cannot be read because they lie outside the prefix."""
    # The orientation of a difference is unknown until the adapter is bound to the base.
    found = [misfit for misfit in misfits(model) if not (model.partial and misfit.kind == "shape")]
    return len(found), sum(misfit.kind == "outside" for misfit in found)


def _may_lose(base: Checkpoint, model: Checkpoint) -> bool:
    """Whether tensors outside a model's prefix may belong to the base's model, which has its own head."""
    if not model.outside or base.folder is None or not (base.folder / CONFIG).is_file():
        return False
    names = read_object(base.folder / CONFIG).get("architectures")
    return isinstance(names, list) and not all(_BARE.fullmatch(str(name)) for name in names)


def _has_more(architecture: Architecture, base: Checkpoint, best: Checkpoint, found: Checkpoint) -> bool:
    """Whether tensors outside the prefix in one view of a model are part of the base's model in another."""
    return bool(best.outside) and any(
        name in architecture.tensors and name not in base and found.tied.get(name) not in base for name in found.names
    )


def _architectures(base: Checkpoint, model: Checkpoint, read: Read) -> Iterator[Architecture]:
    for folder in dict.fromkeys((base.folder, model.folder)):
        if (architecture := read(folder)) is not None:
            yield architecture


def _through_modules(architecture: Architecture, base: Checkpoint, model: Checkpoint) -> Checkpoint:
    """A model under the base's names, matched by module names."""
    stripped, back = to_modules(architecture, base)
    own, table = to_modules(architecture, model)
    found = back.inverse.translate(table.translate(own))
    if stripped.names == base.names:
        return found
    outside = set(stripped.outside)
    first = next(name for name in base.names if name not in outside)
    return found.under(first.removesuffix(stripped.names[0]))
