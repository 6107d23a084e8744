"""The vocabulary of a language model from the files beside its weights: number of rows and token ids."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

_OUTPUT = re.compile(r"(?:.*\.)?(?:lm_head|embed_out|output_embeddings|generator_lm_head|decoder|output)\.weight")
_HEADED = ("LMHeadModel", "ForCausalLM", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")
_TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt")


class Moved(NamedTuple):
    """A token with different ids in two tokenizers."""

    token: str
    first: int
    second: int


def vocabulary_size(folder: Path | None) -> int | None:
    """The number of rows of a model's embeddings according to its `config.json`; None if it does not say.

    Args:
        folder: the folder of the model's configuration; see `Checkpoint.folder`.
    """
    config = _read_json(folder / "config.json") if folder else None
    if not isinstance(config, dict):
        return None
    inner = config.get("text_config")  # in models with vision or audio inputs
    for table in (config, inner if isinstance(inner, dict) else {}):
        if isinstance(table.get("vocab_size"), int):
            return table["vocab_size"]
    return None


def ties_embeddings(folder: Path | None, names: Iterable[str]) -> bool:
    """Whether the model of a folder ties its output embedding to its input embedding.

    Hugging Face's files omit the tied output embedding, and `config.json` tells that it is tied.

    Args:
        folder: the folder of the model's configuration.
        names: names of the model's tensors.
    """
    config = _read_json(folder / "config.json") if folder else None
    if not isinstance(config, dict) or any(_OUTPUT.fullmatch(name) for name in names):
        return False
    if config.get("tie_word_embeddings") is False:
        return False
    return any(str(name).endswith(_HEADED) for name in config.get("architectures") or ())


def moved_tokens(first: Path | None, second: Path | None) -> list[Moved]:
    """Tokens of two models with different ids; none if a tokenizer is missing or cannot be parsed.

    A token that only one model has (added, or a renamed reserved one) is not reported.

    Args:
        first: a model's folder.
        second: another model's folder.
    """
    if first is None or second is None:
        return []
    for name in _TOKENIZERS:
        paths = first / name, second / name
        if all(path.is_file() for path in paths):
            if paths[0].read_bytes() == paths[1].read_bytes():
                return []
            ids, others = _read_tokens(paths[0]), _read_tokens(paths[1])
            return [
                Moved(token, index, others[token]) for token, index in ids.items() if others.get(token, index) != index
            ]
    return []


def _read_tokens(path: Path) -> dict[str, int]:
    """Token → id."""
    if path.suffix == ".txt":
        return {token: index for index, token in enumerate(path.read_text(encoding="utf-8").splitlines())}
    table = _read_json(path)
    if not isinstance(table, dict):
        return {}
    if path.name == "vocab.json":
        return {token: index for token, index in table.items() if isinstance(index, int)}
    try:
        vocabulary = table["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [token, score] by id
            vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
        added = {entry["content"]: entry["id"] for entry in table.get("added_tokens") or ()}
        return {**vocabulary, **added}
    except (KeyError, TypeError, ValueError):
        return {}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
