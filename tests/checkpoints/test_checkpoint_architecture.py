"""The mapping from a file's tensors to those of the model that transformers builds."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from freemerge.checkpoints import CheckpointError
from freemerge.checkpoints.architecture import read_architecture

TEXT = {
    "vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 12,
}  # fmt: skip
VISION = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
MODELS = {
    "stacked and fused": (transformers.MixtralForCausalLM, transformers.MixtralConfig(num_local_experts=3, **TEXT)),
    "stacked, other names": (
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=4, **TEXT),
    ),
    "renamed": (transformers.ViTForImageClassification, transformers.ViTConfig(**VISION)),
    "moved": (
        transformers.LlavaForConditionalGeneration,
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**VISION), text_config=transformers.LlamaConfig(**TEXT),
            image_token_index=12,
        ),
    ),
    "renamed head": (
        transformers.GPTNeoXForCausalLM,
        transformers.GPTNeoXConfig(
            vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
        ),
    ),
    "the same": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**TEXT)),
}  # fmt: skip


def save(folder, case):
    build, config = MODELS[case]
    torch.manual_seed(0)
    model = build(config)
    model.save_pretrained(folder)
    return model.state_dict(), load_file(folder / "model.safetensors")


@pytest.mark.parametrize("case", MODELS)
def test_every_tensor_of_a_file_is_a_view_of_the_models(tmp_path, case):
    tensors, stored = save(tmp_path, case)
    places = read_architecture(tmp_path).locate(stored)
    assert places.keys() == stored.keys()
    for name, place in places.items():
        assert torch.equal(place.of(tensors[place.tensor]), stored[name]), name
    assert sum(tensor.numel() for tensor in stored.values()) == sum(tensor.numel() for tensor in tensors.values())
    assert {place.tensor for place in places.values()} == tensors.keys()


def test_names_of_older_files(tmp_path):
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=12, vocab_size=13
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    names = {
        "bert.embeddings.LayerNorm.gamma": "bert.embeddings.LayerNorm.weight",
        "bert.embeddings.LayerNorm.beta": "bert.embeddings.LayerNorm.bias",
        "embeddings.word_embeddings.weight": "bert.embeddings.word_embeddings.weight",
        "head.weight": None,
    }
    places = read_architecture(tmp_path).locate(names)
    assert {name: places[name].tensor if name in places else None for name in names} == names


@pytest.mark.parametrize(
    "settings",
    [
        {"architectures": ["resnet50"], "num_classes": 3},
        {"architectures": ["PreTrainedModel2"], "model_type": "llama"},
        {"architectures": "LlamaForCausalLM", "model_type": "llama"},
        {"architectures": [], "model_type": ["llama"]},
        {"architectures": ["os"], "model_type": "llama"},
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "auto_map": {"AutoModel": "code.Model"}},
    ],
)
def test_models_that_transformers_does_not_know(tmp_path, settings):
    assert read_architecture(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert read_architecture(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "8"}, r"config\.json: transformers cannot build a LlamaForCausalLM from it"),
        ({"hidden_size": None}, r"config\.json: transformers cannot build a LlamaForCausalLM from it"),
        ({"vocab_size": 10**39}, r"config\.json: transformers cannot build a LlamaForCausalLM from it"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected at most 4096"),
        ({"rope_parameters": [1]}, r"config\.json: transformers cannot build a LlamaForCausalLM from it"),
    ],
)
def test_damaged_configurations(tmp_path, changes, message):
    save(tmp_path, "the same")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_architecture(tmp_path)
    assert "\n" not in str(caught.value)
