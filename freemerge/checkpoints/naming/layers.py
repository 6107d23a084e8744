"""The layers of a model, by the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_LAYER = re.compile(r"((?:(?!\d+(?:\.|$))[^.]+\.)*)(\d+)((?:\..*)?)")
_BEFORE = re.compile(r"(.*[._])?(\w*embed\w*|wte|wpe|shared|pre_\w*norm|patch\w*|\w*_token|stem|conv1)([._].*)?")


class LayerName(NamedTuple):
    """The name of a tensor of a layer: `model.layers.` `3` `.mlp.up_proj.weight`."""

    stack: str
    layer: int
    rest: str

    def at(self, layer: int) -> str:
        """The name of the same tensor in another layer."""
        return f"{self.stack}{layer}{self.rest}"


def split_layer(name: str) -> LayerName | None:
    """The parts of a tensor's name, where the first number is that of a layer; None for tensors outside the layers."""
    found = _LAYER.fullmatch(name)
    return LayerName(found[1], int(found[2]), found[3]) if found else None


def count_layers(names: Iterable[str]) -> dict[str, int]:
    """The number of layers of each stack: `model.layers.` → 32.

    Args:
        names: the names of the model's tensors.
    """
    counts: dict[str, int] = {}
    for found in filter(None, map(split_layer, names)):
        counts[found.stack] = max(counts.get(found.stack, 0), found.layer + 1)
    return counts


def is_before(name: str) -> bool:
    """Whether a tensor outside the layers comes before them: embeddings, and the norm that follows them."""
    return _BEFORE.fullmatch(name) is not None
