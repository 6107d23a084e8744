"""LoRA of parameters (PEFT's target_parameters): experts stacked in one tensor, against PEFT and einsum."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from freemerge.checkpoints import CheckpointError, open_checkpoint, save_checkpoint
from freemerge.merging import PCBMerging, TaskArithmetic, merge

TEXT = {
    "vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 12,
}  # fmt: skip
PREFIX = "base_model.model."


def mixtral():
    """Experts with weights (outputs, inputs)."""
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(num_local_experts=3, **TEXT))


def gpt_oss():
    """Experts with weights (inputs, outputs) and biases."""
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(num_local_experts=3, head_dim=4, **TEXT))


CASES = {
    "mixtral": (mixtral, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], {}),
    "one of two": (mixtral, ["experts.down_proj"], {"rank_pattern": {"experts.down_proj": 4}}),
    "one layer": (mixtral, ["layers.1.mlp.experts.gate_up_proj"], {}),
    "router": (mixtral, ["mlp.gate.weight", "mlp.experts.gate_up_proj"], {"use_rslora": True}),
    "patterns": (
        mixtral,
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        {"alpha_pattern": {"mlp.experts.gate_up_proj": 3, r".*\.1\..*down_proj": 5}, "rank_pattern": {"down_proj": 1}},
    ),
    "gpt-oss": (gpt_oss, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], {}),
    "gpt-oss with biases": (
        gpt_oss, ["experts.gate_up_proj", "gate_up_proj_bias", "experts.down_proj", "down_proj_bias"], {}
    ),
    "a layer's own weight": (gpt_oss, ["self_attn.q_proj.weight"], {"target_modules": ["o_proj"]}),
}  # fmt: skip


def write(folder, build, parameters, settings, seed=0):
    """An adapter with random values, the base, and the model that PEFT merges them into."""
    torch.manual_seed(0)
    model = build()
    base = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    arguments = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj"]} | settings
    wrapped = get_peft_model(model, LoraConfig(target_parameters=parameters, **arguments))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(folder)
    return base, wrapped.merge_and_unload().state_dict()


@pytest.mark.parametrize("case", CASES)
def test_peft_agrees(tmp_path, case):
    base, expected = write(tmp_path / "a", *CASES[case])
    merged = merge(base, [tmp_path / "a"], TaskArithmetic(1.0))
    targets = [target.rpartition(".")[2] for target in CASES[case][1]]
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-6, atol=2e-6)
    changed = {name.rpartition(".")[2] for name, tensor in merged.items() if not torch.equal(tensor, base[name])}
    assert changed >= set(targets)


@pytest.mark.parametrize("case", ["patterns", "gpt-oss with biases"])
def test_chunks_are_parts_of_the_whole(tmp_path, case):
    base, _ = write(tmp_path / "a", *CASES[case])
    adapter = open_checkpoint(tmp_path / "a").on(open_checkpoint(base))
    for name in (name for name in adapter.deltas if "experts" in name):
        whole = adapter.tensor(name).flatten()
        for start in range(0, len(whole), 37):
            stop = min(start + 61, len(whole))
            torch.testing.assert_close(adapter.read_range(name, start, stop), whole[start:stop])


def test_from_files_by_a_global_method(tmp_path):
    written = [write(tmp_path / str(seed), *CASES["gpt-oss"], seed=seed) for seed in range(2)]
    save_checkpoint(tmp_path / "base.safetensors", written[0][0])
    merged = merge(tmp_path / "base.safetensors", [tmp_path / "0", tmp_path / "1"], PCBMerging(0.5))
    expected = merge(written[0][0], [written[0][1], written[1][1]], PCBMerging(0.5))
    for name, tensor in merged.items():
        close = torch.isclose(tensor, expected[name], rtol=1e-4, atol=1e-4)
        assert close.float().mean() > 0.99, name


@pytest.mark.parametrize("parameters", [["experts.gate_up_proj"], ["gate_up_proj_bias", "down_proj_bias"]])
def test_the_model_resolves_ambiguous_shapes(tmp_path, parameters):
    """Square experts and biases of equal lengths: the base's config.json tells them apart."""

    def square():
        config = transformers.GptOssConfig(num_local_experts=3, head_dim=4, **TEXT | {"intermediate_size": 4})
        return transformers.GptOssForCausalLM(config)

    base, expected = write(tmp_path / "a", square, parameters, {})
    model = square()
    model.load_state_dict(base)
    model.save_pretrained(tmp_path / "base")
    for name, tensor in merge(tmp_path / "base", [tmp_path / "a"], TaskArithmetic(1.0)).items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-6, atol=2e-6)
    with pytest.raises(CheckpointError, match="fit them in more than one way"):
        merge(base, [tmp_path / "a"], TaskArithmetic(1.0))


def write_square(folder, tensors=None, **config):
    """A hand-written adapter of rank 2 for experts with square matrices."""
    generator = torch.Generator().manual_seed(3)
    right, left = torch.randn(6, 4, generator=generator), torch.randn(4, 6, generator=generator)
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_parameters": ["experts.up"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    own = {"experts.lora_A.weight": right, "experts.lora_B.weight": left}
    save_checkpoint(folder / "adapter_model.safetensors", {PREFIX + name: t for name, t in (tensors or own).items()})
    return left.view(4, 2, 3), right.view(3, 2, 4)


def test_adapters_from_before_peft_swapped_the_dimensions(tmp_path):
    """Until 0.18 PEFT took the first dimension of an expert's matrix for its inputs."""
    left, right = write_square(tmp_path / "a", peft_version="0.18.1")
    merged = merge({"experts.up": torch.zeros(3, 4, 4)}, [tmp_path / "a"], TaskArithmetic(1.0))
    torch.testing.assert_close(merged["experts.up"], 2 * torch.einsum("ore,eri->eio", left, right))


@pytest.mark.parametrize(
    ("base", "config", "message"),
    [
        (
            {"experts.up": torch.zeros(3, 4, 4)},
            {"peft_version": "0.21.2"},
            r"the factors of 'experts' \(\[4, 6\] · \[6, 4\]\) fit them in more than one way, .* up \[3,",
        ),
        ({"experts.up": torch.zeros(3, 4, 5)}, {}, r"do not fit them, the base has up \[3, 4, 5\]"),
        ({"experts.up": torch.zeros(4, 4, 4)}, {}, "do not fit them"),
        (
            {"experts.up": torch.zeros(3, 4, 4)},
            {"target_parameters": [f"p{index}" for index in range(9)]},
            "has factors of 1 parameters of 'experts', and target_parameters in .* names 9",
        ),
    ],
)
def test_factors_that_cannot_be_placed(tmp_path, base, config, message):
    write_square(tmp_path / "a", **config)
    with pytest.raises(CheckpointError, match=message):
        merge(base, [tmp_path / "a"], TaskArithmetic(1.0))
