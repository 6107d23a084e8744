"""`LanguageBackbone`: prompts, answers, and the states that its logits are computed from."""

import pytest
import torch
from transformers import GenerationConfig

from freemerge.models import EarlyRouter
from freemerge.models.routers import early_features
from tests.language_models import CONFIGS, language_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 2], [10, 11, 12, 2, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
PROMPT = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
CAUSAL = {"input_ids": IDS, "attention_mask": MASK, "prompt_mask": PROMPT}
POINTS = {"llama": "model.layers.0", "gpt2": "transformer.h.0", "t5": "encoder.block.0", "bart": "model.encoder"}


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_logits_of_states_are_the_models_own(kind: str) -> None:
    backbone = language_model(kind)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS[:, :4]}
    if backbone.kind == "causal_lm":
        inputs = CAUSAL
    logits = backbone(inputs)
    positions = torch.zeros(logits.shape[:2], dtype=torch.bool)
    positions[0, 1] = positions[0, 3] = positions[1, 2] = True
    with backbone.states_only(positions) as states:
        assert backbone(inputs).shape == (2, 0, 40)  # no logits were computed
    layer = backbone.model.get_submodule(backbone.output_layer)
    found = backbone.logits_of(states[0], layer.weight, layer.bias)
    torch.testing.assert_close(found, logits[[0, 0, 1], [1, 3, 2]])
    assert torch.equal(backbone(inputs), logits)


def test_answers_begin_after_the_prompt_and_end_with_the_text() -> None:
    labels = torch.where(PROMPT.bool() | (MASK == 0), -100, IDS)
    positions = language_model("llama").answer_positions(labels)
    # The logits at position 2 are of token 3, the first one of the answer; those of the last token are of none.
    assert positions.int().tolist() == [[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]
    assert language_model("t5").answer_positions(labels).equal(labels != -100)


def test_prompts_are_padded_where_generation_needs_it() -> None:
    causal, t5 = language_model("llama"), language_model("t5")
    prompts = causal.prompts(CAUSAL)
    assert prompts["input_ids"].tolist() == [[5, 6, 7], [0, 10, 11]]
    assert prompts["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert causal.router_inputs(CAUSAL)["input_ids"].tolist() == [[5, 6, 7], [10, 11, 0]]
    left = {"input_ids": IDS.flip(1), "attention_mask": MASK.flip(1), "labels": IDS}
    assert t5.prompts(left).keys() == {"input_ids", "attention_mask"}
    assert t5.prompts(left)["input_ids"].tolist() == [[2, 9, 8, 7, 6, 5], [2, 12, 11, 10, 0, 0]]
    assert t5.prompts(left)["attention_mask"].tolist() == MASK.tolist()


@pytest.mark.parametrize("kind", POINTS)
def test_a_router_reads_the_prompt_alone(kind: str) -> None:
    backbone = language_model(kind)
    causal = backbone.kind == "causal_lm"
    inputs = CAUSAL if causal else {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
    found = early_features(inputs, backbone, POINTS[kind])
    answer = PROMPT == 0 if causal else torch.ones_like(PROMPT).bool()
    name = "input_ids" if causal else "labels"
    other = {**inputs, name: torch.where(answer, inputs[name].flip(0) + 20, inputs[name])}

    def close(read: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
        # The root of a small variance magnifies rounding.
        torch.testing.assert_close(early_features(read, backbone, POINTS[kind]), expected, rtol=1e-4, atol=1e-3)

    close(other, found)
    for row, length in enumerate((3, 2) if causal else (6, 4)):
        alone = {"input_ids": IDS[row : row + 1, :length]}
        close(alone, found[row : row + 1])
        # as generation pads them
        padded = torch.nn.functional.pad(alone["input_ids"], (3, 0))
        padding = {"input_ids": padded, "attention_mask": (padded != 0).long()}
        close(padding, found[row : row + 1])
    assert EarlyRouter(2, POINTS[kind], 16)(inputs, backbone).shape == (2, 2)


def test_a_decoders_point_reads_no_answer() -> None:
    backbone = language_model("t5")
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
    found = early_features(inputs, backbone, "decoder.block.1")
    torch.testing.assert_close(early_features({**inputs, "labels": IDS + 9}, backbone, "decoder.block.1"), found)
    assert not torch.allclose(found[0], found[1])  # the decoder has read the prompts


def test_answers_end_at_the_tokens_that_the_arguments_name() -> None:
    backbone, tokens = language_model("llama"), torch.tensor([[3, 5, 0, 0], [3, 4, 6, 5]])
    backbone.model.generation_config.eos_token_id, backbone.model.generation_config.pad_token_id = 5, None
    assert backbone.ends_of(tokens, {}).tolist() == [1, 3]
    assert backbone.ends_of(tokens, {"generation_config": GenerationConfig(eos_token_id=0)}).tolist() == [2, 4]
    assert backbone.ends_of(tokens, {"generation_config": GenerationConfig()}).tolist() == [1, 3]
    assert backbone.ends_of(tokens, {"eos_token_id": [4, 0]}).tolist() == [2, 1]
