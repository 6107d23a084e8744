"""Tied tensors of a model, most often its input and output embeddings.

Hugging Face's files store such a tensor once, twice, or under either name; `config.json` and the architecture's code in
transformers define the ties. These are used only if the names are ambiguous.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from freemerge.checkpoints.architecture import Architecture, read_architecture
from freemerge.checkpoints.checkpoint import Checkpoint
from freemerge.errors import CheckpointError

_INPUT = r"embed_tokens|tok_embeddings|token_embeddings?|tokens_embed|word_embeddings|wte|embed_in|shared"
_OUTPUT = r"lm_head|lm_head\.decoder|embed_out|proj_out|output_embeddings|generator_lm_head|output|predictions\.decoder"
_EMBEDDING = re.compile(rf"(?:.*\.)?(?:{_INPUT}|{_OUTPUT})(?:\..*)?")
_WEIGHTS = re.compile(rf"(?:.*\.)?(?:({_INPUT})|{_OUTPUT})\.weight")

_KEY = "tie_word_embeddings"
_RUN = 1 << 20  # values compared at a time


def may_be_tied(name: str) -> bool:
    """Whether a tensor, or a part of an adapter, has the name of an embedding."""
    return _EMBEDDING.fullmatch(name) is not None


def find_groups(folder: Path | None, names: Iterable[str]) -> list[tuple[str, ...]] | None:
    """The tied tensors of a folder's model, by their names in files; None if the model is unknown.

    Args:
        folder: the folder of its `config.json`.
        names: names of the tensors in its files; some may be those of older versions.
    """
    architecture = _architecture(folder)
    if architecture is None:
        return None
    groups: dict[object, list[str]] = {}
    for name, place in architecture.places.items():
        groups.setdefault(place, []).append(name)
    found = [group for group in groups.values() if len(group) > 1]
    modern = {name for group in found for name in group}
    older = architecture.locate(name for name in names if name not in modern) if found else {}
    current = {place.tensor: name for name, place in older.items() if place.tensor in modern}
    return [tuple(dict.fromkeys(current.get(name, name) for name in group)) for group in found]


def guess_group(names: Iterable[str]) -> tuple[str, ...]:
    """Names of input and output embeddings, possibly tied if the model is unknown; none without an input embedding."""
    found = {name: match[1] for name in names if (match := _WEIGHTS.fullmatch(name))}
    return tuple(found) if len(found) > 1 and any(found.values()) else ()


def obeys_untying(folder: Path | None) -> bool:
    """Whether `tie_word_embeddings: false` in `config.json` unties this model and has no other effect.

    T5 ignores it for ties (it ties equal tensors), and changes the scale of its outputs instead.
    """
    architecture = _architecture(folder)
    if architecture is None:
        return True
    config: Any = type(architecture.model.config)  # each model type has its own settings
    return not config(tie_word_embeddings=False).tie_word_embeddings


def find_left_out(folder: Path, missing: Iterable[str], held: Iterable[str]) -> dict[str, str]:
    """Find names that an index lists and no shard holds because they are tied to a stored one.

    Args:
        folder: the model's folder.
        missing: the names.
        held: the tensors in the shards.

    Returns:
        Missing name → stored name.
    """
    wanted, present = [name for name in missing if may_be_tied(name)], set(held)
    groups = find_groups(folder, (*wanted, *present)) if wanted else None
    found: dict[str, str] = {}
    for group in groups or ():
        first = next((name for name in group if name in present), None)
        found |= {name: first for name in group if first is not None and name in wanted}
    return found


def are_equal(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Whether two tensors have the same values: bit for bit or, for computed differences, up to rounding."""
    computed = first in checkpoint.deltas
    if checkpoint.spec(first) != checkpoint.spec(second) or computed != (second in checkpoint.deltas):
        return False
    size = torch.Size(checkpoint.spec(first).shape).numel()
    for start in range(0, size, _RUN):
        run = start, min(start + _RUN, size)
        ours, theirs = checkpoint.read_range(first, *run), checkpoint.read_range(second, *run)
        if computed and bool((ours - theirs).abs().max() > 1e-5 * ours.abs().max()):
            return False
        if not computed and not torch.equal(ours, theirs):
            return False
    return True


def _architecture(folder: Path | None) -> Architecture | None:
    try:
        return read_architecture(folder)
    except CheckpointError:  # only the ties are needed, and names may suffice
        return None


def separate(config: Mapping[str, object]) -> dict[str, object]:
    """The contents of a `config.json`, changed to untied embeddings."""
    result = {
        key: separate(value) if isinstance(value, dict) and ("vocab_size" in value or _KEY in value) else value
        for key, value in config.items()
    }
    return {**result, _KEY: False}
