"""Which names are those of heads: the advice to exclude a head must never discard trained layers."""

import pytest

from freemerge.merging import is_head


@pytest.mark.parametrize(
    "name",
    [
        "head.weight", "heads.birds.0.bias", "model.classifier.1.weight", "lm_head.weight", "score.weight", "fc.weight",
        "bert.pooler.dense.weight", "roberta.classifier.out_proj.weight", "decoder.layers.0.class_head.weight",
        "qa_outputs.bias", "module.projection.weight", "cls.predictions.bias",
    ],
)  # fmt: skip
def test_heads(name):
    assert is_head(name)


@pytest.mark.parametrize(
    "name",
    [
        "encoder.layers.3.self_attn.out_proj.weight", "layers.0.fc.weight", "blocks.7.projection.bias",
        "headless.weight", "h.0.mlp.fc.out_proj.weight", "embeddings.word_embeddings.weight",
        "layer.1.attention.output.dense.weight",
    ],
)  # fmt: skip
def test_layers_of_the_body(name):
    assert not is_head(name)
