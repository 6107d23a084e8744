"""Tied weights: stored once, twice or under another name, and changed together or under one name only."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file, save_model
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from freemerge.checkpoints import CheckpointError, load_checkpoint, open_checkpoint
from freemerge.merging import MergeError, MergeWarning, TaskArithmetic, merge

METHOD = TaskArithmetic(1.0)
IDS = torch.arange(1, 20)[None]
E, H = "model.embed_tokens.weight", "lm_head.weight"
_TEXT = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
_BART = {f"{side}_{what}": value for side in ("encoder", "decoder") for what, value in
         (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip


def _llama(tied=True):
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, num_key_value_heads=1, **_TEXT))


MAKERS = {
    "llama": _llama,
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(num_key_value_heads=1, head_dim=8, **_TEXT)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)),
    "bert": lambda: BertForMaskedLM(BertConfig(**_TEXT)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ),
    "bart": lambda: BartForConditionalGeneration(BartConfig(vocab_size=64, d_model=16, **_BART)),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")  # PEFT's, of tied models
        yield


def _logits(model):
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(IDS, **more).logits


def _result(kind, folder):
    return _logits(type(kind).from_pretrained(folder))


def _changed(model, folder):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return _logits(model)


def _adapter(model, folder, **settings):
    """An adapter with random values, and the logits of the model with the adapter attached."""
    module = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **settings))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    module.save_pretrained(folder)
    return _logits(module)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("twice", ["base", "model"])
def test_equal_copies_are_dropped(kind, twice, tmp_path):
    """Some files have tied tensors under all their names, as older tools write them; others have them once."""
    model = MAKERS[kind]()
    model.save_pretrained(tmp_path / "base")
    wanted = _changed(model, tmp_path / "model")
    file = tmp_path / twice / "model.safetensors"
    stored = load_file(file)
    copies = {n: stored[first].clone() for n, first in model.all_tied_weights_keys.items() if n not in stored}
    assert copies
    save_file({**stored, **copies}, file, {"format": "pt"})
    merge(tmp_path / "base", [tmp_path / "model"], METHOD, output=tmp_path / "out")
    torch.testing.assert_close(_result(model, tmp_path / "out"), wanted)
    assert not copies.keys() & load_file(tmp_path / "out/model.safetensors").keys()
    assert (tmp_path / "out/config.json").read_text() == (tmp_path / "base/config.json").read_text()


def test_a_tied_tensor_may_be_stored_by_any_of_its_names(tmp_path):
    model = _llama()
    model.save_pretrained(tmp_path / "base")
    wanted = _changed(model, tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors[H] = tensors.pop(E)
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    merge(tmp_path / "base", [tmp_path / "model"], METHOD, output=tmp_path / "out")
    torch.testing.assert_close(_result(model, tmp_path / "out"), wanted)


def test_a_whole_model_with_a_head_of_its_own_is_refused(tmp_path):
    _llama().save_pretrained(tmp_path / "base")
    _changed(_llama(tied=False), tmp_path / "model")
    with pytest.raises(MergeError, match=r"'lm_head\.weight'"):
        merge(tmp_path / "base", [tmp_path / "model"], METHOD, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "bert"])
@pytest.mark.parametrize("where", ["input", "output"])
def test_lora_on_one_of_two_tied_modules_unties_them(kind, where, tmp_path):
    model = MAKERS[kind]()
    model.save_pretrained(tmp_path / "base")
    (output, first), *_ = model.all_tied_weights_keys.items()
    target = (first if where == "input" else output).removesuffix(".weight")
    wanted = _adapter(model, tmp_path / "adapter", target_modules=[target])
    with pytest.warns(MergeWarning, match="untied in the result"):
        merge(tmp_path / "base", [tmp_path / "adapter"], METHOD, output=tmp_path / "out")
    torch.testing.assert_close(_result(MAKERS[kind](), tmp_path / "out"), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_lora_on_the_head_of_an_encoder_and_decoder(kind, tmp_path):
    model = MAKERS[kind]()
    model.save_pretrained(tmp_path / "base")
    wanted = _adapter(model, tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.warns(MergeWarning, match="untied in the result"):
        merge(tmp_path / "base", [tmp_path / "adapter"], METHOD, output=tmp_path / "out")
    torch.testing.assert_close(_result(MAKERS[kind](), tmp_path / "out"), wanted, rtol=1e-4, atol=1e-4)


APART = [{"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]},
         {"modules_to_save": ["embed_tokens", "lm_head"]}, {"target_modules": ["q_proj", "embed_tokens"]}]  # fmt: skip
TOGETHER = [{"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
            {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
            {"trainable_token_indices": {"embed_tokens": [1, 5, 7]}}]  # fmt: skip


@pytest.mark.parametrize("settings", [*APART, *TOGETHER], ids=str)
def test_adapters_change_what_peft_changes(settings, tmp_path):
    model = _llama()
    model.save_pretrained(tmp_path / "base")
    wanted = _adapter(model, tmp_path / "adapter", **{"target_modules": ["q_proj"], **settings})
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(_logits(again), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if settings in TOGETHER else "ignore", MergeWarning)
        merge(tmp_path / "base", [tmp_path / "adapter"], METHOD, output=tmp_path / "out")
    torch.testing.assert_close(_result(_llama(), tmp_path / "out"), wanted, rtol=1e-4, atol=1e-4)
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert (H in tensors) == (settings in APART)


@pytest.mark.filterwarnings("ignore::freemerge.merging.MergeWarning")
def test_an_adapter_of_one_name_beside_a_tied_model_and_trained_tokens(tmp_path):
    """A tied model changes embedding and head together; an adapter changes only one of them."""
    model = _llama()
    model.save_pretrained(tmp_path / "base")
    _changed(model, tmp_path / "model")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    _adapter(base, tmp_path / "lora", target_modules=["embed_tokens"], lora_alpha=2)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    _adapter(base, tmp_path / "tokens", target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 5]})
    merge(
        tmp_path / "base", [tmp_path / "model", tmp_path / "lora", tmp_path / "tokens"], METHOD, output=tmp_path / "out"
    )
    old, found = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    whole = load_file(tmp_path / "model/model.safetensors")[E] - old[E]
    lora = load_file(tmp_path / "lora/adapter_model.safetensors")
    change = (
        lora[f"base_model.model.{E[:-7]}.lora_embedding_B"] @ lora[f"base_model.model.{E[:-7]}.lora_embedding_A"]
    ).T
    rows = torch.zeros_like(whole)
    new = load_file(tmp_path / "tokens/adapter_model.safetensors")
    rows[[1, 5]] = next(value for name, value in new.items() if "trainable_tokens_delta" in name) - old[E][[1, 5]]
    torch.testing.assert_close(found[H], old[E] + whole + rows)
    torch.testing.assert_close(found[E], old[E] + whole + rows + change)


@pytest.mark.parametrize("equal", [True, False])
def test_an_index_that_lists_a_tied_head(equal, tmp_path):
    """transformers loads such folders if the head is tied, and initializes a new head otherwise."""
    model = _llama(tied=equal)
    model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "model", max_shard_size=2000)
    path = tmp_path / "model/model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = index["weight_map"].setdefault(H, index["weight_map"][E])
    tensors = load_file(tmp_path / "model" / file)
    tensors.pop(H, None)
    save_file(tensors, tmp_path / "model" / file, {"format": "pt"})
    path.write_text(json.dumps(index))
    if equal:
        assert torch.equal(load_checkpoint(tmp_path / "model")[H], model.lm_head.weight)
        merge(tmp_path / "base", [tmp_path / "model"], METHOD, output=tmp_path / "out")
        torch.testing.assert_close(_result(model, tmp_path / "out"), _logits(model))
    else:
        with pytest.raises(CheckpointError, match=r"lists the tensor 'lm_head\.weight'"):
            open_checkpoint(tmp_path / "model")


def test_alias_metadata_of_save_model(tmp_path):
    model = _llama()
    model.save_pretrained(tmp_path / "base")
    _changed(model, tmp_path / "model")
    save_model(model, str(tmp_path / "one.safetensors"))
    merged = merge(tmp_path / "base", [tmp_path / "one.safetensors"], METHOD)
    torch.testing.assert_close(merged[E], model.lm_head.weight.detach())


def test_files_without_a_configuration_show_ties_by_their_values(tmp_path):
    torch.manual_seed(1)
    table = torch.randn(8, 4)
    one, both = {"wte.weight": table}, {"wte.weight": table + 1, "lm_head.weight": table + 1}
    assert torch.equal(merge(one, [both], METHOD)["wte.weight"], table + 1)
    merged = merge(both, [one], METHOD)
    assert torch.equal(merged["wte.weight"], table)
    assert torch.equal(merged["lm_head.weight"], table)
    with pytest.raises(MergeError, match=r"lm_head\.weight"):
        merge(one, [{**both, "lm_head.weight": table}], METHOD)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_modules_in_memory_stay_tied_as_peft_merges_them(target, tmp_path):
    model = _llama()
    model.save_pretrained(tmp_path / "base")
    module = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules=[target]))
    module.save_pretrained(tmp_path / "adapter")
    wanted = module.merge_and_unload().state_dict()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.warns(MergeWarning, match="all of them change"):
        merged = merge(base, [tmp_path / "adapter"], METHOD)
    for name, value in merged.items():
        torch.testing.assert_close(value, wanted[name])


def test_an_adapter_cannot_hold_what_is_untied(tmp_path):
    model = _llama()
    model.save_pretrained(tmp_path / "base")
    _adapter(model, tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.warns(MergeWarning), pytest.raises(MergeError, match="is tied to"):
        merge(tmp_path / "base", [tmp_path / "adapter"], METHOD, output=tmp_path / "out", output_format="lora", rank=2)
    assert not (tmp_path / "out").exists()
