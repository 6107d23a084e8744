"""The configuration of a merged model: the base's `config.json`, brought into line with the merged weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

_DTYPES = ("dtype", "torch_dtype")
_OF_WEIGHTS = {*_DTYPES, "architectures", "auto_map", "vocab_size", "tie_word_embeddings"}
_OF_WEIGHTS |= {"id2label", "label2id", "num_labels", "problem_type"}  # keys of the head, which is the base's


def with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Set the dtype of a configuration and its inner configurations (`text_config`).

    transformers cannot build a model with one-byte values; such weights are declared as bfloat16, which represents all
    their values, and are widened when they are loaded.

    Args:
        config: the contents of `config.json`.
        dtype: dtype of all floating-point weights.
    """
    name = str(dtype if dtype.itemsize > 1 else torch.bfloat16).removeprefix("torch.")
    own = {key: name for key in _DTYPES if key in config} or {"dtype": name}
    return {**_changed(config, name), **own}


def with_weights_of(config: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Adapt a fine-tuned model's configuration to weights with the names, dtypes and ties of the base.

    Args:
        config: the contents of the fine-tuned model's `config.json`.
        base: the contents of the base's.
    """
    own = {key: value for key, value in base.items() if key in _OF_WEIGHTS}
    changed = {**{key: value for key, value in config.items() if key not in _OF_WEIGHTS}, **own}
    dtype = next((base[key] for key in _DTYPES if isinstance(base.get(key), str)), None)
    return _changed(changed, dtype) if dtype else changed


def _changed(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Replace every dtype entry."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        if key in _DTYPES and isinstance(value, str):
            result[key] = name
        elif isinstance(value, dict):
            result[key] = _changed(value, name)
        else:
            result[key] = value
    return result


def to_json(table: Mapping[str, Any]) -> bytes:
    """Format a JSON file as transformers does."""
    return (json.dumps(table, indent=2) + "\n").encode()
