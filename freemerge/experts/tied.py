"""Tied weights: one tensor with several names in a model, any of which an expert may use.

GPT-2's head is its embedding, and T5's encoder and decoder share their embedding. A checkpoint may list all the names
or, as transformers writes it, only one. Under whichever names an expert has the tensor, it is changed once, and all
layers that use the tensor see the change.
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
    """Map the names of a model's tensors that an expert changes to the expert's names for them.

    Args:
        weights: name → live tensor of a model; tied ones under each of their names.
        names: the names of the tensors that the expert changes.

    Returns:
        The model's name → the expert's name, in the order of `weights`. If the expert has one tensor under several
        names, the first in `weights` is used.
    """
    tied = find_tied(weights)
    chosen: dict[str, str] = {}  # the first name of a tensor in the model → the expert's name
    for name in weights:
        if name in names:
            chosen.setdefault(tied.get(name, name), name)
    return {name: chosen[first] for name in weights if (first := tied.get(name, name)) in chosen}


def layers_that_change(module: nn.Module, names: Collection[str]) -> dict[str, str]:
    """`names_of_changes` for a module; a layer with two names in the module is listed by its first.

    Args:
        module: the module.
        names: the names of the tensors that the expert changes.

    Returns:
        The module's name → the expert's name.

    Raises:
        ValueError: if the module has no tensor with one of the names.
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
    """Rename an expert's tensors to their first names in a model, so that experts with other names can be summed.

    Args:
        expert: the expert.
        weights: name → live tensor of the model; tied ones under each of their names.

    Returns:
        The expert, which is the same object if nothing is renamed.
    """
    tied = find_tied(weights)
    chosen = {own: tied.get(own, own) for own in names_of_changes(weights, expert.shapes).values()}
    if chosen.keys() == expert.shapes.keys() and all(own == first for own, first in chosen.items()):
        return expert
    tables = {}  # of every kind of expert, the fields that map tensor names
    for field in fields(expert):
        table = getattr(expert, field.name)
        if isinstance(table, Mapping) and table.keys() <= expert.shapes.keys():
            tables[field.name] = {chosen[name]: value for name, value in table.items() if name in chosen}
    return replace(expert, **tables)
