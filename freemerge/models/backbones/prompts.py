"""Batches of prompts of different lengths: where they are padded, and which arguments of `generate` that disturbs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from freemerge.inputs import join_padded

_READ_PADDING = {
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "sequence_bias": None, "bad_words_ids": None, "guidance_scale": 1.0,
    "prompt_lookup_num_tokens": None,
}  # fmt: skip
_COUNT_PADDING = ("max_length", "min_length", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn",
                  "assistant_model", "custom_generate")  # fmt: skip
"""Arguments of transformers' `generate` for which a padded prompt is another one than alone."""


def reads_padding(arguments: Mapping[str, Any], own: Any) -> bool:
    """Whether transformers' `generate` would treat a padded prompt as another one than alone.

    Args:
        arguments: those of `generate`, such as `max_length` and `repetition_penalty`.
        own: the model's generation configuration.
    """
    asked = arguments.get("generation_config")
    usual = {**vars(own), **(vars(asked) if asked is not None else {}), **arguments}
    if any(usual.get(name) not in (None, neutral) for name, neutral in _READ_PADDING.items()):
        return True
    return any(arguments.get(name) or getattr(asked, name, None) for name in _COUNT_PADDING)


def padded(given: dict[str, Any], mask: Tensor, pad: int, left: bool) -> dict[str, Any]:
    """The tokens of inputs that are in a mask, in order, padded on one side.

    Args:
        given: inputs by name, with `input_ids` (B, L).
        mask: (B, L) bool, the tokens to keep.
        pad: the padding token.
        left: whether to pad on the left.

    Returns:
        `input_ids` and `attention_mask` int64 (B, P), and the other inputs; P is the length of the longest row.
    """
    order = (mask if left else ~mask).to(torch.uint8).argsort(dim=1, stable=True)  # the kept tokens on one side
    width = max(1, int(mask.sum(dim=1).max()))
    part = slice(-width, None) if left else slice(width)
    kept = mask.gather(1, order)[:, part]  # (B, P)

    def moved(tensor: Any) -> Any:
        return tensor.gather(1, order)[:, part] if isinstance(tensor, Tensor) and tensor.shape == mask.shape else tensor

    moved_all = {name: moved(tensor) for name, tensor in given.items()}
    ids = moved_all["input_ids"].masked_fill(~kept, pad)
    return {**moved_all, "input_ids": ids, "attention_mask": kept.long()}


def in_order(answers: Sequence[Tensor], parts: Sequence[Tensor], pad: int) -> Tensor:
    """Join the answers to parts of a batch.

    Args:
        answers: int64 (b·R, N) of each part.
        parts: int64 (b,), the samples of each part.
        pad: the padding token.

    Returns:
        (B·R, N) in the order of the batch.
    """
    order = torch.cat(list(parts)).argsort()
    joined = join_padded(answers, pad)
    return joined.view(len(order), -1, joined.shape[1])[order].flatten(0, 1)
