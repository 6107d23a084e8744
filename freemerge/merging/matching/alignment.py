"""Fine-tuned models brought to the names of their base, whatever each of them calls its tensors.

Most have the base's own names, or have them under a prefix. Where that does not fit, base and model are brought to the
names of the modules that a `config.json` describes, and from there to the base's.
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
    """Fine-tuned models under the base's names; adapters are not yet bound to the base."""

    models: tuple[Checkpoint, ...]
    possible: Set[str] = frozenset()  # tensors that the base's model has, whether or not its files do, as far as known
    problem: str | None = None  # why names of modules could not be told, if they were asked for


def align(base: Checkpoint, models: Sequence[Checkpoint], misfits: Find) -> Aligned:
    """Bring models to the base's names.

    Args:
        base: the pretrained model.
        models: the fine-tuned models.
        misfits: the tensors of a model that do not fit the base.

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
    """How many tensors do not fit, and how many of them cannot even be read because they lie beside a prefix."""
    # How a difference lies in the base's tensor is not known before the adapter is bound to it.
    found = [misfit for misfit in misfits(model) if not (model.partial and misfit.kind == "shape")]
    return len(found), sum(misfit.kind == "outside" for misfit in found)


def _may_lose(base: Checkpoint, model: Checkpoint) -> bool:
    """Whether what lies beside a model's prefix may be of the base's model, which has a head of its own."""
    if not model.outside or base.folder is None or not (base.folder / CONFIG).is_file():
        return False
    names = read_object(base.folder / CONFIG).get("architectures")
    return isinstance(names, list) and not all(_BARE.fullmatch(str(name)) for name in names)


def _has_more(architecture: Architecture, base: Checkpoint, best: Checkpoint, found: Checkpoint) -> bool:
    """Whether what lies beside a prefix in one view of a model is a part of the base's model in another."""
    return bool(best.outside) and any(
        name in architecture.tensors and name not in base and found.tied.get(name) not in base for name in found.names
    )


def _architectures(base: Checkpoint, model: Checkpoint, read: Read) -> Iterator[Architecture]:
    for folder in dict.fromkeys((base.folder, model.folder)):
        if (architecture := read(folder)) is not None:
            yield architecture


def _through_modules(architecture: Architecture, base: Checkpoint, model: Checkpoint) -> Checkpoint:
    """A model under the base's names, found by way of those of the modules."""
    stripped, back = to_modules(architecture, base)
    own, table = to_modules(architecture, model)
    found = back.inverse.translate(table.translate(own))
    if stripped.names == base.names:
        return found
    outside = set(stripped.outside)
    first = next(name for name in base.names if name not in outside)
    return found.under(first.removesuffix(stripped.names[0]))
