"""Embeddings of models with different vocabularies: the rows that are merged.

A fine-tuned model may have added tokens, a base may have padding rows. Row i is token i in all of them, so the rows
that they share can be merged; rows that only some models have cannot be compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from freemerge.checkpoints import Checkpoint
from freemerge.checkpoints.vocabulary import moved_tokens, vocabulary_size
from freemerge.errors import MergeError

Embeddings = Literal["error", "base", "common"]
EMBEDDINGS: tuple[Embeddings, ...] = ("error", "base", "common")

# Names of input and output embeddings in architectures.
_NAMES = re.compile(
    r"(?:.*\.)?(?:embed_tokens|tok_embeddings|token_embeddings?|word_embeddings|wte|embed_in|embed_out|shared|"
    r"output_embeddings|lm_head|lm_head\.(?:decoder|linear)|generator_lm_head|vocab_projector|"
    r"predictions|predictions\.decoder)\.(?:weight|bias)"
)


def is_embedding(name: str) -> bool:
    """Whether a tensor has the name of an input or output token embedding."""
    return _NAMES.fullmatch(name) is not None


def is_vocabulary(name: str, base: Checkpoint, model: Checkpoint) -> bool:
    """Whether a tensor has a row for each token, and the rows of base and model can be matched.

    This follows from known names, or from the base's `config.json` if its `vocab_size` is the tensor's number of rows.

    Args:
        name: a tensor that both have.
        base: the pretrained model.
        model: a fine-tuned one.
    """
    ours, theirs = base.spec(name).shape, model.spec(name).shape
    if not ours or len(ours) != len(theirs) or ours[1:] != theirs[1:]:
        return False
    if is_embedding(name):
        return True
    return ours[0] == vocabulary_size(base.folder) and vocabulary_size(model.folder) in (None, theirs[0])


def match_rows(
    base: Checkpoint, models: Sequence[Checkpoint], merged: Sequence[str], embeddings: Embeddings
) -> dict[str, tuple[int, ...]]:
    """The number of rows of each model that take part, for tensors whose vocabularies differ.

    Args:
        base: the pretrained model.
        models: the fine-tuned models.
        merged: names of the tensors to merge.
        embeddings: "error", "base" or "common"; see `merge`.

    Returns:
        name → for each model, its number of leading rows that are used; its other rows are treated as the base's.

    Raises:
        MergeError: vocabularies differ, and `embeddings` is "error"; it has another value; or a token has another row
            in a model than in the base.
    """
    if embeddings not in EMBEDDINGS:
        raise MergeError(f"embeddings must be one of {', '.join(EMBEDDINGS)}, got {embeddings!r}")
    rows: dict[str, tuple[int, ...]] = {}
    for name in merged:
        own = base.spec(name).shape[0] if base.spec(name).shape else 0
        # A model without this tensor leaves all rows of the base unchanged.
        counts = [model.spec(name).shape[0] if _differs(name, base, model) else own for model in models]
        if any(count != own for count in counts):
            shared = min(own, *counts)
            rows[name] = tuple(shared if embeddings == "common" else min(own, count) for count in counts)
            if embeddings == "error":
                raise MergeError(_misfit(name, own, dict(zip((m.label for m in models), counts, strict=True))))
    _compare_tokens(base, models, merged)
    return rows


def _differs(name: str, base: Checkpoint, model: Checkpoint) -> bool:
    return model.has(name) and model.spec(name).shape != base.spec(name).shape and is_vocabulary(name, base, model)


def _misfit(name: str, rows: int, counts: Mapping[str, int]) -> str:
    others = [
        f"{abs(count - rows)} {'more' if count > rows else 'fewer'} in {label}"
        for label, count in counts.items()
        if count != rows
    ]
    return (
        f"the vocabulary differs: the tensor '{name}' has {rows:,} rows in the base, {', '.join(others)}; "
        "embeddings='base' merges the rows that the base has, embeddings='common' only those that all models have, and "
        f"exclude=['{name}'] keeps the base's"
    )


def _compare_tokens(base: Checkpoint, models: Sequence[Checkpoint], merged: Sequence[str]) -> None:
    """Refuse to merge rows that belong to different tokens according to the tokenizers."""
    for model in models:
        embedded = next((n for n in merged if is_embedding(n) and model.has(n) and is_vocabulary(n, base, model)), None)
        if embedded and (moved := moved_tokens(base.folder, model.folder)):
            token, ours, theirs = moved[0]
            raise MergeError(
                f"{model.label}: its tokenizer gives the token {token!r} the id {theirs}, expected {ours} as in "
                f"{base.label} ({len(moved):,} tokens have another id), so the rows of '{embedded}' are of different "
                f"tokens; exclude=['{embedded}'] keeps the base's"
            )
