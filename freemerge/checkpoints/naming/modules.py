"""The table between file names and module names of a checkpoint, from the model that its base describes."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from freemerge.checkpoints.architecture import Architecture, Place
from freemerge.checkpoints.checkpoint import Checkpoint
from freemerge.checkpoints.naming.blocks import Block
from freemerge.checkpoints.naming.tables import Table
from freemerge.errors import CheckpointError


def to_modules(architecture: Architecture, checkpoint: Checkpoint) -> tuple[Checkpoint, Table]:
    """A checkpoint under its own names without the wrapping prefix, and the table from these to the modules' names.

    Its tensors may have the names of files of any version or those of the model's modules, all under a prefix
    (`backbone.`).

    Args:
        architecture: the model.
        checkpoint: a file of it, a Lightning checkpoint, an adapter, or the state dict of such a model.
    """
    own = getattr(architecture.model, "base_model_prefix", "")
    known = {**architecture.places, **architecture.tensors}
    # A model saved without its head also lacks the prefix of its body.
    inner = (name.removeprefix(f"{own}.") for name in known)
    best: tuple[int, Checkpoint, Table] | None = None
    for reference in (known, dict.fromkeys(inner)):
        try:
            stripped = checkpoint.relative_to(reference)
        except CheckpointError:  # two prefixes match equally well
            continue
        table = find_table(architecture, stripped)
        count = sum(name in table.renamed or name in table.sources for name in stripped.names)
        if best is None or count > best[0]:
            best = count, stripped, table
    return best[1:] if best else (checkpoint, find_table(architecture, checkpoint))


def find_table(architecture: Architecture, checkpoint: Checkpoint) -> Table:
    """The table from a checkpoint's names to those of the model's modules, without names that the model lacks.

    Args:
        architecture: the model.
        checkpoint: a checkpoint with the names of files or of modules.
    """
    names = tuple(dict.fromkeys((*checkpoint.names, *checkpoint.tied)))
    of_modules = sum(name in architecture.tensors and name not in architecture.places for name in names)
    of_files = sum(name in architecture.places and name not in architecture.tensors for name in names)
    # Names that fit both are taken as file names in a model's folder, and as module names elsewhere.
    by_modules = of_modules > of_files or (of_modules == of_files and checkpoint.folder is None)
    places = {} if by_modules else architecture.locate(names)
    if by_modules:
        apart = [name for name in names if name not in architecture.tensors]
        places = architecture.locate(apart) | {name: _whole(architecture, name) for name in names if name not in apart}
    return _make_table(architecture, names, places)


def _whole(architecture: Architecture, name: str) -> Place:
    shape = tuple(architecture.tensors[name].shape)
    return Place(name, shape, tuple(prod(shape[dim + 1 :]) for dim in range(len(shape))), 0)


def _make_table(architecture: Architecture, names: Iterable[str], places: dict[str, Place]) -> Table:
    renamed: dict[str, str] = {}
    cut: dict[str, Place] = {}
    for name in names:
        if (place := places.get(name)) is None:
            continue
        whole = _whole(architecture, place.tensor)
        if place._replace(stride=whole.stride) == whole and place.offset == 0 and _is_dense(place):
            renamed[name] = place.tensor
        else:
            cut[name] = place
    # Tied tensors have one place and several names.
    taken: dict[str, str] = {}
    storages = {name: tensor.untyped_storage()._cdata for name, tensor in architecture.tensors.items()}
    tied: dict[int, list[str]] = {}
    for name, storage in storages.items():
        tied.setdefault(storage, []).append(name)
    for name in sorted(renamed, key=lambda name: name != renamed[name]):
        alike = tied[storages[renamed[name]]]
        own = name if name in alike else next((other for other in alike if other not in taken), None)
        if own is not None and own not in taken:
            taken[own] = name
    renamed = {name: own for own, name in taken.items()}
    blocks: dict[str, list[Block]] = {}
    for name, place in cut.items():
        steps = [prod(place.shape[dim + 1 :]) for dim in range(len(place.shape))]
        block = Block.make(place.tensor, place.shape, place.offset, place.stride, 0, steps)
        blocks.setdefault(place.tensor, []).append(block.inverted(name))
    assembled = {target: tuple(each) for target, each in blocks.items() if target not in taken}
    targets = {target: tuple(architecture.tensors[target].shape) for target in assembled}
    sources = {name: place.shape for name, place in cut.items() if place.tensor in assembled}
    return Table(renamed, assembled, sources, targets)


def _is_dense(place: Place) -> bool:
    dense = [prod(place.shape[dim + 1 :]) for dim in range(len(place.shape))]
    return all(size == 1 or own == step for size, own, step in zip(place.shape, place.stride, dense, strict=True))
