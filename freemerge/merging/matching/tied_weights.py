"""Tied weights across models: stored once in one file and twice in another, or changed under only one of their names.

- If all models agree that the tensors are tied, they are merged once, and equal copies are dropped.
- If an adapter changes them separately (PEFT changes the embedding but not the head that shares its weight), they are
  untied: every model and the result have all of them.
- Tied tensors in memory stay tied, as in PEFT's `merge_and_unload`, with a warning: the user's module can store only
  one.
- Values are compared only where a model has more than one of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from freemerge.checkpoints import Checkpoint
from freemerge.checkpoints.tied_tensors import are_equal, find_groups, guess_group, may_be_tied
from freemerge.errors import MergeWarning


class Settled(NamedTuple):
    """Models with the same ties."""

    base: Checkpoint
    models: tuple[Checkpoint, ...]
    untied: dict[str, str]  # name → the name that it is no longer tied to


def settle_ties(base: Checkpoint, models: Sequence[Checkpoint]) -> Settled:
    """Give base and models the same ties, and bind adapters to the base.

    Args:
        base: the pretrained model.
        models: the fine-tuned models by the base's names; adapters not yet bound to their base, see `Checkpoint.on`.

    Raises:
        CheckpointError: an adapter does not fit the base, or a file cannot be read.
    """
    if not _in_doubt(base, models):
        return Settled(base, tuple(model.on(base) for model in models), {})
    groups = _find_groups(base, models)
    kept = {}
    for leader, group in groups.items():
        kept[leader] = others = [name for name in group if name != leader and _tied(base, leader, name)]
        base = base.tying(dict.fromkeys(others, leader))
    alone: dict[str, list[str]] = {}  # leader → the models in which the group's tensors are not all equal
    settled = []
    for model in models:
        model = model.on(base)
        for leader, group in groups.items():
            agree = _agree_adapter if model.partial else _agree
            model, agrees = agree(model, leader, group)
            if not agrees and base.folder is None and (name := _only_change(model, group)):
                _warn(
                    f"{model.label}: changes '{name}' alone, and the base holds one tensor for "
                    f"{', '.join(map(repr, group))}: all of them change; merge into a folder to have them untied"
                )
                model, agrees = _spread(model, name, leader, group), True
            if not agrees and model.partial:  # whole models with a separate head are misfits, see `find_misfits`
                alone.setdefault(leader, []).append(model.label)
        settled.append(model)
    untied: dict[str, str] = {}
    for leader in groups if any(kept[leader] for leader in alone) else ():  # one setting covers all ties of a model
        own = kept[leader]
        base, settled = base.apart(own), [model.apart(own) for model in settled]
        untied |= dict.fromkeys(own, leader)
        if leader in alone:
            named = ", ".join(f"'{name}'" for name in own)
            _warn(
                f"{', '.join(alone[leader])}: '{leader}' and {named} are tied in the base, and are changed each in "
                "its own way; they are untied in the result"
            )
    return Settled(base, tuple(settled), untied)


def _warn(message: str) -> None:
    warnings.warn(message, MergeWarning, stacklevel=4)


def _only_change(model: Checkpoint, group: Sequence[str]) -> str | None:
    """The tensor of a group that an adapter changes, if it changes only one."""
    changed = [name for name in group if name in model.names] if model.partial else []
    return changed[0] if len(changed) == 1 else None


def _spread(model: Checkpoint, name: str, leader: str, group: Sequence[str]) -> Checkpoint:
    """An adapter whose change of one tensor applies to the whole group."""
    if name != leader:
        model = model.renamed({other: leader if other == name else other for other in model.names})
    return model.tying({other: leader for other in group if other != leader})


def _in_doubt(base: Checkpoint, models: Sequence[Checkpoint]) -> bool:
    """Whether models have different embeddings, or an adapter changes one."""
    own = _embeddings((*base.names, *base.tied))
    for model in models:
        stored = (*model.names, *model.tied, *model.outside, *(model.source if model.partial else ()))
        found = _embeddings(stored)
        if found if model.partial else found != own:
            return True
    return False


def _embeddings(names: Iterable[str]) -> set[str]:
    return set(filter(may_be_tied, names))


def _find_groups(base: Checkpoint, models: Sequence[Checkpoint]) -> dict[str, tuple[str, ...]]:
    """Groups of names that are tied in the base, by the first of them that the base has."""
    names = dict.fromkeys(name for model in (base, *models) for name in (*model.names, *model.tied))
    found: dict[str, list[str]] = {}
    for name, first in base.tied.items():
        found.setdefault(first, [first]).append(name)
    known = find_groups(base.folder, names)
    if known is None:  # for a base file without a configuration, a fine-tuned model's folder may define the ties
        folders = (model.folder for model in models if not model.partial and model.folder is not None)
        known = next((groups for folder in folders if (groups := find_groups(folder, names)) is not None), None)
    if known is None:
        group = guess_group(names)
        known = [group] if group and _equal_where_all_are(group, (base, *models)) else []
    for group in known:
        leader = next((name for name in group if name in base.names and name not in base.tied), None)
        if leader is not None:
            found[leader] = list(dict.fromkeys((leader, *found.get(leader, ()), *group)))
    return {leader: tuple(group) for leader, group in found.items()}


def _equal_where_all_are(group: Sequence[str], models: Sequence[Checkpoint]) -> bool:
    """Whether some model has several of a group's tensors, and they are equal in all models that do."""
    whole = [model for model in models if not model.partial]
    several = [(model, own) for model in whole if len(own := [name for name in group if name in model.names]) > 1]
    return bool(several) and all(are_equal(model, own[0], name) for model, own in several for name in own[1:])


def _tied(model: Checkpoint, leader: str, name: str) -> bool:
    return name not in model.names or model.tied.get(name) == leader or are_equal(model, leader, name)


def _agree(model: Checkpoint, leader: str, group: Sequence[str]) -> tuple[Checkpoint, bool]:
    """A whole model that has all of a group's tensors, and whether they are equal in it."""
    stored = [name for name in group if name in model.names and model.tied.get(name) not in group]
    if not stored:
        return model, True
    if leader not in stored:  # stored under another of its names
        model = model.renamed({name: leader if name == stored[0] else name for name in (*model.names, *model.tied)})
    different = [name for name in stored[leader not in stored :] if name != leader and not _tied(model, leader, name)]
    return model.tying({name: leader for name in group if name != leader and name not in different}), not different


def _agree_adapter(model: Checkpoint, leader: str, group: Sequence[str]) -> tuple[Checkpoint, bool]:
    """An adapter that changes all of a group's tensors equally, or none, and True; otherwise the adapter and False."""
    changed = [name for name in group if name in model.names]
    if not changed:
        return model, True
    if not any(name in model.alone for name in changed) and changed == [leader]:
        return model.tying({name: leader for name in group if name != leader}), True
    if len(changed) == len(group) and all(_tied(model, leader, name) for name in group if name != leader):
        return model.tying({name: leader for name in group if name != leader}), True
    return model, False
