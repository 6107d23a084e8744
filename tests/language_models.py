"""Tiny random language models of several architectures, and experts for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from freemerge.experts import Expert, extract, extract_low_rank
from freemerge.models import LanguageBackbone

VOCABULARY = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
GROUPED = {**SIZES, **VOCABULARY, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **GROUPED},
    "gpt2": {"model_type": "gpt2", **VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gemma2": {"model_type": "gemma2", **GROUPED, "final_logit_softcapping": 0.1},
    "cohere": {"model_type": "cohere", **GROUPED, "logit_scale": 0.3},
    "granite": {"model_type": "granite", **GROUPED, "logits_scaling": 3.0},
    "mamba": {"model_type": "mamba", **VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "t5": {
        "model_type": "t5", **VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2,
        "num_decoder_layers": 2, "num_heads": 2, "decoder_start_token_id": 0,
    },
    "bart": {
        "model_type": "bart", **VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
        "max_position_embeddings": 64, "decoder_start_token_id": 2, "forced_eos_token_id": None,
    },
}  # fmt: skip


def language_model(kind: str, seed: int = 0) -> LanguageBackbone:
    """A random model whose tokens depend on its inputs: the usual initial weights are too small for that."""
    torch.manual_seed(seed)
    backbone = LanguageBackbone(config=CONFIGS[kind]).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return backbone


def residual(backbone: LanguageBackbone, seed: int, size: float = 1.0) -> dict[str, Tensor]:
    """A random difference from the weights; tied weights have one."""
    generator = torch.Generator().manual_seed(seed)
    named = dict(backbone.model.named_parameters())
    return {name: size * torch.randn(tensor.shape, generator=generator) for name, tensor in named.items()}


def expert_of(backbone: LanguageBackbone, seed: int, kind: str = "low_rank") -> Expert:
    """An expert that changes the model's answers."""
    if kind == "low_rank":
        return extract_low_rank(residual(backbone, seed), rank=2, vectors="none")
    return extract(residual(backbone, seed), 0.2)
