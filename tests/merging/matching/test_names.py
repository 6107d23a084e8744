"""Fine-tuned models whose tensor names differ from the base's: names in transformers' files and of its modules."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from freemerge.merging import MergeError, TaskArithmetic, merge
from tests import processes

TEXT = {
    "vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 12,
}  # fmt: skip
VISION = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
BERT = {
    "vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12,
}  # fmt: skip
NEOX = {
    "vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12,
}  # fmt: skip
MIXTRAL = (transformers.MixtralForCausalLM, transformers.MixtralConfig(num_local_experts=3, **TEXT))
VIT = (transformers.ViTModel, transformers.ViTConfig(**VISION))
LLAVA = (
    transformers.LlavaForConditionalGeneration,
    transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=12,
    ),
)
MODELS = {
    "vit": VIT,
    "mixtral": MIXTRAL,
    "qwen3 moe": (
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=4, **TEXT),
    ),
    "llava": LLAVA,
    "gpt neox": (transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig(**NEOX)),
}


def make(folder, case):
    """A base in a folder, and a model fine-tuned from it, in memory."""
    build, config = case
    torch.manual_seed(0)
    model = build(copy.deepcopy(config))
    model.save_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0, msg=name)


def half(base, tuned):
    return {name: base[name] + 0.5 * (tuned[name] - base[name]) for name in base}


@pytest.mark.parametrize("case", MODELS)
def test_a_lightning_checkpoint_on_the_folder_it_began_with(tmp_path, case):
    model = make(tmp_path / "base", MODELS[case])
    state = {f"net.model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state | {"net.loss.weight": torch.ones(2)}, "epoch": 1}, tmp_path / "x.ckpt")
    merge(tmp_path / "base", [tmp_path / "x.ckpt"], TaskArithmetic(0.5), output=tmp_path / "out")
    model.save_pretrained(tmp_path / "tuned")
    base, tuned, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "tuned", "out"))
    assert_close(merged, half(base, tuned))
    record = json.loads((tmp_path / "out/freemerge.json").read_text())
    assert record["finetuned"][0]["left_out"] == ["net.loss.weight"]


@pytest.mark.parametrize("case", MODELS)
def test_a_folder_on_a_module(tmp_path, case):
    """The base in memory has module names, and so does the result."""
    model = make(tmp_path / "base", MODELS[case])
    base = type(model).from_pretrained(tmp_path / "base").state_dict()
    model.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    merged = merge(base, [tmp_path / "tuned"], TaskArithmetic(0.5))
    assert_close(merged, half(base, model.state_dict()))


# ViT's layers are `query` and `value` in transformers 5.0.
@pytest.mark.parametrize(
    ("case", "targets"), [(VIT, r".*(q_proj|v_proj|query|value)"), (LLAVA, r".*language_model.*[qv]_proj")]
)
def test_an_adapter_on_the_folder_it_began_with(tmp_path, case, targets):
    make(tmp_path / "base", case)
    model = case[0].from_pretrained(tmp_path / "base")
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    peft.save_pretrained(tmp_path / "adapter")
    peft.merge_and_unload().save_pretrained(tmp_path / "tuned")
    merge(tmp_path / "base", [tmp_path / "adapter"], TaskArithmetic(1.0), output=tmp_path / "out")
    assert_close(load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "tuned/model.safetensors"))


def test_an_adapter_of_stacked_experts(tmp_path):
    make(tmp_path / "base", MIXTRAL)
    model = MIXTRAL[0].from_pretrained(tmp_path / "base")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, target_modules=[], target_parameters=targets, init_lora_weights=False)
    peft = get_peft_model(model, config)
    peft.save_pretrained(tmp_path / "adapter")
    peft.merge_and_unload().save_pretrained(tmp_path / "tuned")
    merge(tmp_path / "base", [tmp_path / "adapter"], TaskArithmetic(1.0), output=tmp_path / "out")
    assert_close(load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "tuned/model.safetensors"))


def test_gamma_and_beta(tmp_path):
    """The result has the base's names."""
    model = make(tmp_path / "base", (transformers.BertForMaskedLM, transformers.BertConfig(**BERT)))

    def old(tensors):
        names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, name in names.items():
            tensors = {key.replace(new, name): value for key, value in tensors.items()}
        return tensors

    path = tmp_path / "base/model.safetensors"
    save_file(old(load_file(path)), path, {"format": "pt"})
    model.save_pretrained(tmp_path / "tuned")
    merge(tmp_path / "base", [tmp_path / "tuned"], TaskArithmetic(0.5), output=tmp_path / "out")
    tuned = old(load_file(tmp_path / "tuned/model.safetensors"))
    assert_close(load_file(tmp_path / "out/model.safetensors"), half(load_file(path), tuned))


def test_names_of_an_earlier_version(tmp_path):
    """LLaVA's modules were arranged differently until transformers 4.52; one model or both may use the old names."""
    model = make(tmp_path / "base", LLAVA)
    model.save_pretrained(tmp_path / "tuned")
    tuned = load_file(tmp_path / "tuned/model.safetensors")
    assert "language_model.model.norm.weight" in tuned  # these are the old names
    save_file(model.state_dict(), tmp_path / "tuned/model.safetensors", {"format": "pt"})
    merge(tmp_path / "base", [tmp_path / "tuned"], TaskArithmetic(0.5), output=tmp_path / "out")
    base, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert_close(merged, half(base, tuned))


def gpt2(tmp_path):
    """A base as on the Hub, without its module's prefix, and the module itself."""
    config = transformers.GPT2Config(vocab_size=13, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    return model, tensors


@pytest.mark.parametrize("described", [True, False])
def test_a_trained_head_that_the_base_has_tied_is_not_lost(tmp_path, described):
    _, tensors = gpt2(tmp_path)
    if not described:
        (tmp_path / "base/config.json").unlink()
    state = {f"transformer.{name}": value + 0.5 for name, value in tensors.items()}
    torch.save(state | {"lm_head.weight": torch.randn(13, 8)}, tmp_path / "x.pt")
    (tmp_path / "tuned").mkdir()
    save_file(torch.load(tmp_path / "x.pt"), tmp_path / "tuned/model.safetensors", {"format": "pt"})
    (tmp_path / "tuned/config.json").write_text("{}")
    for source in ["tuned"] + ["x.pt"] * described:
        with pytest.raises(MergeError, match=r"'lm_head\.weight'"):
            merge(tmp_path / "base", [tmp_path / source], TaskArithmetic(1.0))
    merged = merge(tmp_path / "base", [tmp_path / "tuned"], TaskArithmetic(1.0), exclude=["lm_head.*"])
    assert_close(merged, {name: value + 0.5 for name, value in tensors.items()})


def test_tensors_of_the_body_are_never_called_a_head():
    base = {"a.weight": torch.zeros(2), "b.weight": torch.zeros(2)}
    other = {"a.weight": torch.ones(2), "b.kernel": torch.ones(2), "head.weight": torch.ones(2)}
    with pytest.raises(MergeError) as caught:
        merge(base, {"x": other}, TaskArithmetic(1.0), exclude=["b.weight"])
    assert str(caught.value) == (
        "x: the tensor 'b.kernel' with shape [2] is not in base, and what was trained there would be lost: the two "
        "name their tensors differently, or this is not the model's base; if there is a folder with its "
        "config.json, give that, for names to be matched; nor do these fit: 'head.weight' (not in the base)"
    )


def test_keeping_the_base_is_not_suggested_if_names_differ():
    base = {"a.weight": torch.zeros(2), "b.weight": torch.zeros(2)}
    with pytest.raises(MergeError) as caught:
        merge(base, {"x": {"a.weight": torch.ones(2), "b.kernel": torch.ones(2)}}, TaskArithmetic(1.0))
    assert str(caught.value) == (
        "x: the tensor 'b.weight' is missing; base has it with shape [2]; it has 'b.kernel', which is not in the "
        "base: the two name their tensors differently, or this is not the model's base; nor do these fit: 'b.kernel' "
        "(not in the base)"
    )


def test_misfits_are_named_up_to_ten():
    base = {f"{index}.weight": torch.zeros(2) for index in range(15)}
    with pytest.raises(MergeError) as caught:
        merge(base, {"x": {"0.weight": torch.ones(2)}}, TaskArithmetic(1.0))
    assert str(caught.value).endswith(
        "nor do these fit: '2.weight' (missing), '3.weight', '4.weight', '5.weight', '6.weight', '7.weight', "
        "'8.weight', '9.weight', '10.weight' and 4 more"
    )


def test_the_command_reports_tensors_left_out(tmp_path):
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "base.safetensors")
    torch.save(
        {"net.a.weight": torch.ones(2), "head.weight": torch.ones(3), "head.bias": torch.ones(1)}, tmp_path / "x.pt"
    )
    argv = [
        "--base",
        "base.safetensors",
        "--finetuned",
        "[x.pt]",
        "--method",
        "TaskArithmetic",
        "--output",
        "o.safetensors",
    ]
    done = processes.run("-m", "freemerge", "merge", *argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["note: x.pt: left out, as the base has no such tensors: head.weight, head.bias"]


def test_names_that_fit_need_no_transformers(tmp_path):
    make(tmp_path / "base", VIT).save_pretrained(tmp_path / "tuned")
    code = (
        "import sys; from freemerge.merging import TaskArithmetic, merge; "
        "merge('base', ['tuned'], TaskArithmetic(1.0)); sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0
