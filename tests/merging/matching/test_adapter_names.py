"""Adapters use the model's module names, whatever the tensor names in the base's files: PEFT applies every change."""

import json
import shutil
import warnings
from fnmatch import fnmatch

import pytest
import torch
import transformers
from peft import (
    AdaLoraConfig,
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import save_file

from freemerge.checkpoints import CheckpointError, load_checkpoint
from freemerge.merging import MergeError, TaskArithmetic, WeightAverage, merge

TEXT = {
    "vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 12,
}  # fmt: skip
VISION = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
ENCODER = {
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "vocab_size": 13,
}


def build(case):
    t = transformers
    name, config = {
        "mixtral": ("MixtralForCausalLM", lambda: t.MixtralConfig(num_local_experts=3, **TEXT)),
        "square mixtral": (
            "MixtralForCausalLM", lambda: t.MixtralConfig(num_local_experts=3, **TEXT | {"intermediate_size": 4})
        ),
        "qwen3 moe": (
            "Qwen3MoeForCausalLM",
            lambda: t.Qwen3MoeConfig(
                num_experts=3, num_experts_per_tok=2, moe_intermediate_size=10, head_dim=4, mlp_only_layers=[1], **TEXT
            ),
        ),
        "qwen2 moe, an expert shared": (
            "Qwen2MoeForCausalLM",
            lambda: t.Qwen2MoeConfig(
                num_experts=3, num_experts_per_tok=2, moe_intermediate_size=10, shared_expert_intermediate_size=6,
                **TEXT,
            ),
        ),
        "gpt-oss": ("GptOssForCausalLM", lambda: t.GptOssConfig(num_local_experts=3, head_dim=4, **TEXT)),
        "vit": ("ViTForImageClassification", lambda: t.ViTConfig(**VISION)),
        "llava": (
            "LlavaForConditionalGeneration",
            lambda: t.LlavaConfig(
                vision_config=t.CLIPVisionConfig(**VISION), text_config=t.LlamaConfig(**TEXT), image_token_index=12
            ),
        ),
        "gpt-neox": (
            "GPTNeoXForCausalLM",
            lambda: t.GPTNeoXConfig(
                vocab_size=13, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12
            ),
        ),
        "a backbone": ("LlamaModel", lambda: t.LlamaConfig(**TEXT)),
        "classifier": ("BertForSequenceClassification", lambda: t.BertConfig(num_labels=3, **ENCODER)),
        "classifier of two layers": (
            "RobertaForSequenceClassification", lambda: t.RobertaConfig(num_labels=3, pad_token_id=1, **ENCODER)
        ),
        "classifier of tokens": ("BertForTokenClassification", lambda: t.BertConfig(num_labels=3, **ENCODER)),
        "gpt-2": (
            "GPT2LMHeadModel",
            lambda: t.GPT2Config(
                n_layer=2, n_head=2, n_embd=8, vocab_size=13, n_positions=16, tie_word_embeddings=False
            ),
        ),
        "dinov2": ("Dinov2Model", lambda: t.Dinov2Config(mlp_ratio=2, **VISION)),
        "mamba": (
            "MambaForCausalLM",
            lambda: t.MambaConfig(
                vocab_size=13, hidden_size=8, state_size=4, num_hidden_layers=2, time_step_rank=4,
                tie_word_embeddings=False,
            ),
        ),
        "whisper": (
            "WhisperForConditionalGeneration",
            lambda: t.WhisperConfig(
                vocab_size=13, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12, num_mel_bins=4,
                max_source_positions=8, max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                decoder_start_token_id=1, tie_word_embeddings=False,
            ),
        ),
    }[case]  # fmt: skip
    return getattr(transformers, name), config()


CASES = [
    "mixtral", "qwen3 moe", "qwen2 moe, an expert shared", "gpt-oss", "vit", "llava", "gpt-neox", "a backbone",
    "classifier", "classifier of two layers", "classifier of tokens", "gpt-2", "dinov2", "whisper", "mamba",
]  # fmt: skip


# Parameters beside inner modules that are better changed by factors, or by a name that is the end of others.
OF_NO_ADAPTER = {
    "dinov2": ["embeddings.*_token", "embeddings.position_embeddings"],
    "gpt-oss": ["*.sinks"],
    "mamba": ["*.mixer.A_log", "*.mixer.D"],
}


def make(folder, case, seeds=(1,), changed=lambda name: True):
    """The folder of a base, and those of models that were fine-tuned from it."""
    kind, config = build(case)
    torch.manual_seed(0)
    model = kind(config)
    model.save_pretrained(folder / "base")
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    paths = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        model.load_state_dict(start)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if changed(name):
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        paths.append(folder / f"tuned{seed}")
        model.save_pretrained(paths[-1])
    return kind, paths


def load(kind, base, adapter):
    """The base with the adapter as PEFT computes it; any warning of PEFT is an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(kind.from_pretrained(base), adapter).merge_and_unload()
    told = [str(warning.message) for warning in caught]
    assert not [text for text in told if "not found" in text or "unexpected" in text.lower()], told
    return model.state_dict()


@pytest.mark.parametrize("case", CASES)
def test_peft_applies_every_change(tmp_path, case):
    """Every tensor that an adapter can hold differs from the base; the rank exceeds that of any matrix."""
    exclude = OF_NO_ADAPTER.get(case)
    kind, paths = make(tmp_path, case, seeds=(1, 2))
    whole = merge(tmp_path / "base", paths, WeightAverage(), exclude=exclude, output=tmp_path / "whole")
    adapter = merge(
        tmp_path / "base", paths, WeightAverage(), exclude=exclude,
        output=tmp_path / "lora", output_format="lora", rank=16,
    )  # fmt: skip
    expected, found = kind.from_pretrained(whole).state_dict(), load(kind, tmp_path / "base", adapter)
    base = kind.from_pretrained(tmp_path / "base").state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
        left_out = not tensor.is_floating_point() or any(fnmatch(name, pattern) for pattern in exclude or ())
        assert torch.equal(tensor, base[name]) == left_out, name


@pytest.mark.parametrize("case", ["mixtral", "gpt-oss", "llava"])
def test_the_error_of_a_lower_rank_is_the_true_one(tmp_path, case):
    kind, paths = make(tmp_path, case, changed=lambda name: "sinks" not in name)
    whole = merge(tmp_path / "base", paths, WeightAverage(), output=tmp_path / "whole")
    adapter = merge(tmp_path / "base", paths, WeightAverage(), output=tmp_path / "lora", output_format="lora", rank=2)
    record = json.loads((adapter / "freemerge.json").read_text())["truncation"]
    base, expected = (kind.from_pretrained(path).state_dict() for path in (tmp_path / "base", whole))
    found = load(kind, tmp_path / "base", adapter)
    lost = total = 0.0
    for name, tensor in expected.items():
        difference, change = float((found[name] - tensor).norm()), float((tensor - base[name]).norm())
        assert abs(difference - record["tensors"].get(name, 0.0) * change) < 1e-5 * (1 + change), name
        lost, total = lost + difference**2, total + change**2
    assert record["overall"] == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    assert record["overall"] > 0.1


def test_stacked_experts_as_peft_stores_them(tmp_path):
    kind, paths = make(tmp_path, "mixtral", changed=lambda name: "layers.1.mlp.experts" in name)
    adapter = merge(tmp_path / "base", paths, WeightAverage(), output=tmp_path / "a", output_format="lora", rank=3)
    config = json.loads((adapter / "adapter_config.json").read_text())
    experts = "model.layers.1.mlp.experts"
    assert config["target_parameters"] == [f"{experts}.down_proj", f"{experts}.gate_up_proj"]
    assert config["target_modules"] == []
    shapes = {
        name: tuple(tensor.shape) for name, tensor in load_checkpoint(adapter / "adapter_model.safetensors").items()
    }
    assert shapes == {  # 3 experts of rank 3; PEFT wraps the module for gate_up_proj first, then for down_proj
        f"base_model.model.{experts}.base_layer.lora_A.weight": (9, 8),
        f"base_model.model.{experts}.base_layer.lora_B.weight": (24, 9),
        f"base_model.model.{experts}.lora_A.weight": (9, 12),
        f"base_model.model.{experts}.lora_B.weight": (8, 9),
    }
    load(kind, tmp_path / "base", adapter)


def test_a_part_of_the_experts(tmp_path):
    """Excluded parts of a stacked tensor keep the base's values."""
    kind, paths = make(tmp_path, "mixtral")
    exclude = ["*experts.1.*", "*gate.weight"]
    whole = merge(tmp_path / "base", paths, WeightAverage(), exclude=exclude, output=tmp_path / "whole")
    adapter = merge(
        tmp_path / "base", paths, WeightAverage(), exclude=exclude,
        output=tmp_path / "lora", output_format="lora", rank=12,
    )  # fmt: skip
    found, expected = load(kind, tmp_path / "base", adapter), kind.from_pretrained(whole).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def test_tasks_and_bases(tmp_path):
    """PEFT finds the model class and the Hub id of the base that the inputs were trained on."""
    kind, _ = make(tmp_path, "mixtral")
    paths = []
    for seed in range(2):
        model = kind.from_pretrained(tmp_path / "base")
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.peft_config["default"].base_model_name_or_path = "someone/mixtral-tiny"
        paths.append(tmp_path / f"in{seed}")
        model.save_pretrained(paths[-1])
    adapter = merge(tmp_path / "base", paths, WeightAverage(), output=tmp_path / "a", output_format="lora", rank=4)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/mixtral-tiny"
    assert config["task_type"] == "CAUSAL_LM"
    assert 'base_model: "someone/mixtral-tiny"' in (adapter / "README.md").read_text()


def test_without_a_name_on_the_hub_the_base_is_a_path(tmp_path, monkeypatch):
    """The absolute path of the folder, however the base was given."""
    _, paths = make(tmp_path, "mixtral", changed=lambda name: "q_proj" in name)
    monkeypatch.chdir(tmp_path)
    adapter = merge("base/model.safetensors", paths, WeightAverage(), output="a", output_format="lora", rank=8)
    assert "base_model:" not in (adapter / "README.md").read_text()
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "base"
    )
    monkeypatch.chdir("/")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / adapter).merge_and_unload().state_dict()
    tuned = transformers.MixtralForCausalLM.from_pretrained(paths[0]).state_dict()
    name = "model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(loaded[name], tuned[name], rtol=1e-5, atol=1e-5)


def test_a_model_without_a_task_of_peft(tmp_path):
    _, paths = make(tmp_path, "vit", changed=lambda name: name.endswith(("q_proj.weight", "query.weight")))
    adapter = merge(tmp_path / "base", paths, WeightAverage(), output=tmp_path / "a", output_format="lora", rank=8)
    loaded = AutoPeftModel.from_pretrained(adapter).merge_and_unload()
    tuned = transformers.ViTForImageClassification.from_pretrained(paths[0]).state_dict()
    assert isinstance(loaded, transformers.ViTForImageClassification)
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, tuned[name], rtol=1e-5, atol=1e-5, msg=name)


def test_a_base_of_the_hubs_cache(tmp_path):
    _, paths = make(tmp_path, "gpt-neox", changed=lambda name: "query_key_value.weight" in name)
    cached = tmp_path / "models--someone--neox" / "snapshots" / "0123"
    shutil.copytree(tmp_path / "base", cached)
    adapter = merge(cached, paths, WeightAverage(), output=tmp_path / "a", output_format="lora", rank=4)
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/neox"


def test_the_written_adapter_reads_back(tmp_path):
    """The adapter of gpt-oss, whose files have the names of its modules."""
    _, paths = make(tmp_path, "gpt-oss", changed=lambda name: "sinks" not in name)
    adapter = merge(tmp_path / "base", paths, WeightAverage(), output=tmp_path / "a", output_format="lora", rank=12)
    again = merge(tmp_path / "base", [adapter], TaskArithmetic(1.0))
    for name, tensor in merge(tmp_path / "base", paths, WeightAverage()).items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
VIT_LAYERS = ["q_proj", "fc1", "query", "intermediate.dense"]  # the last two are the first two in transformers 5.0
ADAPTERS = {
    "stacked experts": ("mixtral", LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS)),
    "stacked experts that are square": (
        "square mixtral", LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS[:1])
    ),
    "experts and a router": (
        "qwen3 moe", LoraConfig(r=2, target_modules=["q_proj"], target_parameters=[*EXPERTS, "mlp.gate.weight"])
    ),
    "dora and a head": (
        "vit", LoraConfig(r=2, target_modules=VIT_LAYERS, use_dora=True, modules_to_save=["classifier"])
    ),
    "oft": ("vit", OFTConfig(oft_block_size=4, target_modules=VIT_LAYERS)),
    "lokr": ("llava", LoKrConfig(r=2, target_modules=["q_proj", "linear_1"])),
    "adalora": (
        "gpt-neox", AdaLoraConfig(init_r=2, total_step=10, target_modules=["lm_head", "query_key_value"])
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_from_adapters_of_modules_to_files_and_to_an_adapter(tmp_path, case):
    model, config = ADAPTERS[case]
    kind, _ = make(tmp_path, model, seeds=())
    wrapped = get_peft_model(kind.from_pretrained(tmp_path / "base"), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(tmp_path / "in")
    expected = load(kind, tmp_path / "base", tmp_path / "in")
    method = TaskArithmetic(1.0)
    folder = merge(tmp_path / "base", [tmp_path / "in"], method, output=tmp_path / "model")
    adapter = merge(tmp_path / "base", [tmp_path / "in"], method, output=tmp_path / "a", output_format="lora", rank=16)
    for found in (kind.from_pretrained(folder).state_dict(), load(kind, tmp_path / "base", adapter)):
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=2e-6, msg=name)


def test_tensors_of_no_module(tmp_path):
    """An unchanged buffer of an old file is ignored."""
    kind, paths = make(tmp_path, "gpt-neox")
    for folder, mystery in ((tmp_path / "base", 1.0), (paths[0], 2.0)):
        file = folder / "model.safetensors"
        tensors = load_checkpoint(file)
        strange = {"gpt_neox.layers.0.attention.masked_bias": torch.ones(4), "mystery": torch.full((4,), mystery)}
        save_file(tensors | strange, file, metadata={"format": "pt"})
    arguments = {"output": tmp_path / "a", "output_format": "lora", "rank": 8}
    with pytest.raises(MergeError, match=r"'mystery' has changed and is not part of the model"):
        merge(tmp_path / "base", paths, WeightAverage(), **arguments)
    assert not (tmp_path / "a").exists()
    merge(tmp_path / "base", paths, WeightAverage(), exclude=["mystery"], **arguments)
    load(kind, tmp_path / "base", tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": [8]}, r"config\.json: transformers cannot build a GPTNeoXForCausalLM from it"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected at most"),
        ({"vocab_size": 17}, r"'embed_out\.weight' has changed and is not part of the model"),
    ],
)
def test_a_damaged_configuration_of_the_base(tmp_path, changes, message):
    _, paths = make(tmp_path, "gpt-neox")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises((CheckpointError, MergeError), match=message):
        merge(
            tmp_path / "base", paths, WeightAverage(), exclude=["*embed_in*"],
            output=tmp_path / "a", output_format="lora", rank=4,
        )  # fmt: skip
    assert not (tmp_path / "a").exists()
