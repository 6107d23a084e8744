"""Layers of several models, one after the other, as one model: `a[0:16]+b[8:24]`.

- No tensor is copied: the model reads each from where it is, under its new name.
- A layer may occur several times, and need not occur at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from freemerge.checkpoints.checkpoint import Checkpoint
from freemerge.checkpoints.json_files import find_object
from freemerge.checkpoints.naming.layers import count_layers, is_before, split_layer
from freemerge.errors import CheckpointError

_PIECE = r"([^\[\]+][^\[\]]*?)\[(\d+):(\d+)\]"
_STACK = re.compile(rf"{_PIECE}(?:\s*\+\s*{_PIECE})*")
COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""The keys of `config.json` that may hold the number of layers."""


class Piece(NamedTuple):
    """Consecutive layers of a model."""

    model: str  # its path or name on the Hub
    first: int
    stop: int  # the layer after the last


def parse_stack(text: str) -> list[Piece] | None:
    """The pieces of `a[0:16]+b[8:24]`; None for other text, and for a path that exists.

    Args:
        text: the name of a model.
    """
    if _STACK.fullmatch(text) is None or Path(text).exists():
        return None
    return [Piece(model, int(first), int(stop)) for model, first, stop in re.findall(rf"\s*\+?\s*{_PIECE}", text)]


def open_stack(text: str, pieces: Sequence[Piece], open_model: Callable[[str], Checkpoint]) -> Checkpoint:
    """The model that consists of the layers of others.

    Tensors before the layers (embeddings) are those of the first piece's model, all others outside the layers those of
    the last piece's, like the folder of the first.

    Args:
        text: the label.
        pieces: the layers.
        open_model: opens a model.

    Raises:
        CheckpointError: a model has no such layers, or the models do not fit together.
    """
    opened = {piece.model: open_model(piece.model) for piece in pieces}
    first, last = opened[pieces[0].model], opened[pieces[-1].model]
    stacks = {model: _find_stack(checkpoint) for model, checkpoint in opened.items()}
    places: dict[str, tuple[Checkpoint, str]] = {}
    if len(pieces) == 1 and pieces[0].stop - pieces[0].first == count_layers(first.names)[stacks[pieces[0].model]]:
        return first  # the whole model
    for name in first.names:
        if is_before(name) and not _is_in(name, stacks[pieces[0].model]):
            places[name] = (first, name)
    order: list[int] = []
    for piece in pieces:
        checkpoint, stack = opened[piece.model], stacks[piece.model]
        count = count_layers(checkpoint.names)[stack]
        if not piece.first < piece.stop <= count:
            raise CheckpointError(
                f"{text}: {piece.model} has the layers 0 to {count - 1}, not [{piece.first}:{piece.stop}]"
            )
        for name in checkpoint.names:
            found = split_layer(name)
            if found and found.stack == stack and piece.first <= found.layer < piece.stop:
                places[found.at(found.layer - piece.first + len(order))] = (checkpoint, name)
        order += range(piece.first, piece.stop)
    for name in last.names:
        if not is_before(name) and not _is_in(name, stacks[pieces[-1].model]):
            places[name] = (last, name)
    specs = {name: checkpoint.spec(old) for name, (checkpoint, old) in places.items()}
    ties = [{name: other for name, other in model.tied.items() if split_layer(name) is None} for model in (first, last)]
    if ties[0] != ties[1]:
        raise CheckpointError(
            f"{text}: {first.label} and {last.label} differ in which of their tensors are tied; begin and end with "
            "layers of the same model"
        )

    def read(name: str, run: tuple[int, int] | None) -> Tensor:
        checkpoint, old = places[name]
        return checkpoint.tensor(old) if run is None else checkpoint.read_range(old, *run)

    return Checkpoint(
        text,
        specs,
        read,
        tied=ties[0],
        folder=first.folder,
        layers=order,
    )


def _is_in(name: str, stack: str) -> bool:
    found = split_layer(name)
    return found is not None and found.stack == stack


def _find_stack(checkpoint: Checkpoint) -> str:
    """The prefix of the names of a model's layers: `model.layers.`."""
    if checkpoint.deltas or checkpoint.partial:
        raise CheckpointError(f"{checkpoint.label}: is an adapter or a task vector; merge it with its base first")
    counts = count_layers(checkpoint.names)
    count = _count_in(find_object(checkpoint.folder / "config.json") or {}) if checkpoint.folder else None
    fitting = [stack for stack, layers in counts.items() if count is None or layers == count]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise CheckpointError(f"{checkpoint.label}: no tensor's name has the number of a layer ({_tell(counts)})")
    raise CheckpointError(
        f"{checkpoint.label}: has several stacks of layers, and it is unclear which is meant: {_tell(counts)}"
    )


def _tell(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{stack}0 to {count - 1}" for stack, count in counts.items()) or "there are none"


def _count_in(config: Mapping[str, Any]) -> int | None:
    """The number of layers in a configuration, or in that of its language model."""
    for table in (config, config.get("text_config")):
        if isinstance(table, Mapping) and (found := [table[key] for key in COUNTS if isinstance(table.get(key), int)]):
            return int(found[0])
    return None


def with_layers(config: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """A model's configuration for a stack of its layers: their number, and settings with a value for each layer.

    Args:
        config: the contents of the first model's `config.json`.
        order: for each layer, the number of the layer that it was.
    """
    if not any(key in config for key in COUNTS) and isinstance(config.get("text_config"), dict):
        return {**config, "text_config": with_layers(config["text_config"], order)}
    count = _count_in(config)
    changed = dict(config)
    for key, value in config.items():
        if key in COUNTS:
            changed[key] = len(order)
        elif "layer" in key and isinstance(value, list) and len(value) == count:  # such as layer_types
            changed[key] = [value[index] for index in order if index < len(value)]
    return changed
