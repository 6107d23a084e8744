"""Tied weights: one memory that a model knows by several names, of which an expert may have any.

GPT-2's head is its embedding, T5's encoder and decoder share theirs. A checkpoint may list all the names or, as
transformers writes it, only one. Whatever names an expert has, the memory is changed once, and all who compute with it
see the change.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from typing import TypeVar

from torch import Tensor, nn

from freemerge.checkpoints import find_tied
from freemerge.experts.base import Expert

_Expert = TypeVar("_Expert", bound=Expert)


def names_of_changes(weights: Mapping[str, Tensor], names: Collection[str]) -> dict[str, str]:
    """Every name in `weights` whose memory an expert changes → the name by which the expert has that change.

    Args:
        weights: a model's live tensors; tied ones under each of their names.
        names: which tensors the expert has.

    Returns:
        In the order of `weights`. Of several names for one memory that the expert has, the first in `weights` counts.
    """
    tied = find_tied(weights)
    chosen: dict[str, str] = {}  # the first name of a memory → the expert's
    for name in weights:
        if name in names:
            chosen.setdefault(tied.get(name, name), name)
    return {name: chosen[first] for name in weights if (first := tied.get(name, name)) in chosen}


def layers_that_change(module: nn.Module, names: Collection[str]) -> dict[str, str]:
    """The same of a module's tensors, each layer once: one that has two names in the module is listed by its first.

    Raises:
        ValueError: if the module has no tensor of one of the names.
    """
    live = module.state_dict(keep_vars=True)
    for name in names:
        if name not in live:
            raise ValueError(f"{type(module).__name__} has no tensor {name!r}")
    changes = names_of_changes(live, names)
    if len(changes) == len(names):  # nothing tied
        return changes
    first = {path for path, _ in module.named_modules()}
    return {name: own for name, own in changes.items() if name.rpartition(".")[0] in first}


def by_first_names(expert: _Expert, weights: Mapping[str, Tensor]) -> _Expert:
    """The expert with each memory's first name in `weights`, so that experts which call it differently can be added."""
    tied = find_tied(weights)
    chosen = {own: tied.get(own, own) for own in names_of_changes(weights, expert.shapes).values()}
    if chosen.keys() == expert.shapes.keys() and all(own == first for own, first in chosen.items()):
        return expert
    tables = {}  # field → the same by the other names: all fields that have something of each tensor, whatever the kind
    for field in fields(expert):
        table = getattr(expert, field.name)
        if isinstance(table, Mapping) and table.keys() <= expert.shapes.keys():
            tables[field.name] = {chosen[name]: value for name, value in table.items() if name in chosen}
    return replace(expert, **tables)
