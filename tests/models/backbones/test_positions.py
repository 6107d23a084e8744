"""Texts with more tokens than an encoder has learned positions."""

from __future__ import annotations

import pytest
import torch

from freemerge.models import TransformersBackbone


@pytest.mark.parametrize(("kind", "positions"), [("bert", 10), ("roberta", 8), ("distilbert", 10)])
def test_a_text_with_too_many_tokens_is_a_one_line_error(kind: str, positions: int) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    small = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16} if kind == "distilbert" else sizes
    config = {"model_type": kind, "vocab_size": 30, "max_position_embeddings": 10, "pad_token_id": 1, **small}
    backbone = TransformersBackbone(config=config)
    batch = {"input_ids": torch.full((2, positions), 5), "attention_mask": torch.ones(2, positions, dtype=torch.int64)}
    assert backbone(batch).shape == (2, 16)
    longer = {name: torch.cat([value, value[:, :1]], dim=1) for name, value in batch.items()}
    with pytest.raises(
        ValueError,
        match=f"a text has {positions + 1} tokens, and the model has {positions} positions; set the data",
    ):
        backbone(longer)


def test_rotary_positions_have_no_limit() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = {"model_type": "modernbert", "vocab_size": 30, "pad_token_id": 0, "max_position_embeddings": 8, **sizes}
    assert TransformersBackbone(config=config).max_tokens is None
