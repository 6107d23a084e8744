"""Adapters written by PEFT merge to the result of PEFT's own `merge_and_unload`."""

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, TrainableTokensConfig, get_peft_model
from torch import nn

from freemerge.checkpoints import CheckpointError, open_checkpoint, save_checkpoint
from freemerge.merging import PCBMerging, TaskArithmetic, WeightAverage, merge


def gpt2():
    """Layers with weights (inputs, outputs), some of them square, and a head with (outputs, inputs)."""
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=16, tie_word_embeddings=False
    )
    return transformers.GPT2LMHeadModel(config)


def bert():
    """Layers with biases."""
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=12, vocab_size=13,
        max_position_embeddings=9, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def llama():
    """No biases, tied embeddings."""
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=8, num_attention_heads=2, num_key_value_heads=1, intermediate_size=12,
        vocab_size=13, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


class Vision(nn.Module):
    """Convolutions of all sizes and torch's own attention."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 6, (2, 3))
        self.mix = nn.Conv2d(6, 6, 1)
        self.line = nn.Conv1d(6, 4, 3)
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 2)


CASES = {
    "llama": (llama, LoraConfig(r=3, lora_alpha=7, target_modules="all-linear")),
    "tied embeddings": (llama, LoraConfig(r=3, target_modules=["embed_tokens", "q_proj"])),
    "conv1d, rslora, patterns": (
        gpt2,
        LoraConfig(
            r=3, lora_alpha=7, target_modules=["c_attn", "c_fc", "wpe"], fan_in_fan_out=True, use_rslora=True,
            alpha_pattern={"c_fc": 2}, rank_pattern={"h.0.mlp.c_fc": 2}, modules_to_save=["ln_f"],
        ),
    ),
    "both orientations": (gpt2, LoraConfig(r=2, target_modules=["c_attn", "lm_head"])),
    "both orientations, square": (gpt2, LoraConfig(r=2, target_modules=["c_attn", "c_proj", "lm_head"])),
    "biases": (bert, LoraConfig(r=2, target_modules=["query", "dense"], bias="all", task_type="SEQ_CLS")),
    "biases of the layers": (bert, LoraConfig(r=2, target_modules=["query", "dense"], bias="lora_only")),
    "biases of the factors": (bert, LoraConfig(r=2, target_modules=["query", "dense"], lora_bias=True)),
    "vision": (Vision, LoraConfig(r=2, target_modules=["patches", "mix", "line", "head"])),
    "dora": (llama, LoraConfig(r=2, target_modules=["q_proj", "down_proj", "embed_tokens"], use_dora=True)),
    "dora, conv1d, rslora": (
        gpt2,
        LoraConfig(
            r=2, target_modules=["c_attn", "c_proj", "wte"], use_dora=True, use_rslora=True, fan_in_fan_out=True
        ),
    ),
    "dora, convolutions": (Vision, LoraConfig(r=2, target_modules=["patches", "mix", "line", "head"], use_dora=True)),
    "tokens": (llama, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 0, 7])),
    "tokens by name": (
        gpt2, LoraConfig(r=2, target_modules=["c_attn"], trainable_token_indices={"wte": [5], "wpe": [1]})
    ),
    "tokens alone": (llama, TrainableTokensConfig(token_indices=[2, 9], target_modules=["embed_tokens"])),
    "ia3": (llama, IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ia3 with biases": (
        bert,
        IA3Config(
            target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"], task_type="SEQ_CLS"
        ),
    ),
    "ia3, conv1d": (gpt2, IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
    "ia3, convolutions": (
        Vision, IA3Config(target_modules=["patches", "mix", "head"], feedforward_modules=["mix", "head"])
    ),
}  # fmt: skip


def write(folder, build, config, seed=0):
    """A saved adapter with random values, and the tensors of the model that PEFT merges it into."""
    torch.manual_seed(0)
    model = build()
    base = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, first in open_checkpoint(model).tied.items():
        base[name] = base[first]
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(folder)
    return base, wrapped.merge_and_unload().state_dict()


@pytest.mark.parametrize("case", CASES)
def test_peft_agrees(tmp_path, case):
    base, expected = write(tmp_path / "adapter", *CASES[case])
    merged = merge(base, [tmp_path / "adapter"], TaskArithmetic(1.0))
    changed = 0
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-6, atol=2e-6)
        changed += not torch.equal(tensor, base[name])
    assert changed >= 2


def test_torch_attention_is_refused(tmp_path):
    """PEFT 0.21 adds the difference of out_proj twice, also in training, so the intended weights are ambiguous."""
    base, _ = write(tmp_path / "adapter", Vision, LoraConfig(r=2, target_modules=["attention"]))
    with pytest.raises(CheckpointError, match=r"out_proj.* is of torch's MultiheadAttention"):
        merge(base, [tmp_path / "adapter"], TaskArithmetic(1.0))


@pytest.mark.parametrize("case", ["dora", "dora, conv1d, rslora", "ia3 with biases", "ia3, conv1d", "tokens"])
def test_chunks_are_parts_of_the_whole(tmp_path, case):
    base, _ = write(tmp_path / "adapter", *CASES[case])
    adapter = open_checkpoint(tmp_path / "adapter").on(open_checkpoint(base))
    for name in adapter.deltas:
        whole = adapter.tensor(name).flatten()
        for start in range(0, len(whole), 7):
            stop = min(start + 11, len(whole))
            torch.testing.assert_close(adapter.read_range(name, start, stop), whole[start:stop])


def test_adapters_of_every_kind_beside_a_full_model(tmp_path):
    """With a global method, from files, under a prefix: equal to the merge of the full models that PEFT computes."""
    kinds = ["llama", "dora", "ia3", "tokens"]
    written = {kind: write(tmp_path / kind, *CASES[kind], seed=index) for index, kind in enumerate(kinds)}
    base, full = written["llama"]
    finetuned = {"full": full} | {kind: tmp_path / kind for kind in kinds[1:]}
    expected = merge(base, {"full": full} | {kind: written[kind][1] for kind in kinds[1:]}, PCBMerging(0.5))
    inner = {name.removeprefix("model."): tensor for name, tensor in base.items() if name.startswith("model.")}
    save_checkpoint(tmp_path / "base.safetensors", base)
    for source in (base, tmp_path / "base.safetensors", inner):
        merged = merge(source, finetuned, PCBMerging(0.5), exclude=["*lm_head*"] if source is inner else None)
        for name, tensor in merged.items():
            full_name = f"model.{name}" if source is inner else name
            # A value at the threshold may fall on either side of it.
            close = torch.isclose(tensor, expected[full_name], rtol=1e-4, atol=1e-4)
            assert close.float().mean() > 0.99, name


def test_differences_that_depend_on_the_base_are_marked(tmp_path):
    base, expected = write(tmp_path / "adapter", *CASES["ia3"])
    alone = open_checkpoint(tmp_path / "adapter")
    name = "model.layers.0.self_attn.k_proj.weight"
    with pytest.raises(CheckpointError, match=r"depends on its base; merge it with its base, or open it as"):
        alone.tensor(name)
    for prefix in ("", "net."):
        other = open_checkpoint({prefix + key: tensor for key, tensor in base.items()})
        bound = alone.under(prefix).on(other) if prefix else alone.on(other)
        assert bound.label == str(tmp_path / "adapter")
        torch.testing.assert_close(other.tensor(prefix + name) + bound.tensor(prefix + name), expected[name])
    # The same adapter on two bases: no state of the first is kept.
    for scale in (1.0, 3.0):
        scaled = open_checkpoint({key: tensor * scale for key, tensor in base.items()})
        torch.testing.assert_close(alone.on(scaled).tensor(name), scale * bound.tensor("net." + name))


def test_the_wrong_base(tmp_path):
    base, _ = write(tmp_path / "adapter", *CASES["ia3"])
    narrow = {name: tensor[:-1] if "k_proj" in name else tensor for name, tensor in base.items()}
    with pytest.raises(CheckpointError, match=r"k_proj.weight' has shape .* is this the base that the adapter was"):
        merge(narrow, [tmp_path / "adapter"], WeightAverage())


class Mixed(nn.Module):
    """Layers of both orientations, one of them square; names do not reveal the orientation."""

    def __init__(self):
        super().__init__()
        self.first = transformers.pytorch_utils.Conv1D(6, 4)
        self.second = transformers.pytorch_utils.Conv1D(4, 4)
        self.last = nn.Linear(4, 3)


def test_a_square_matrix_that_could_lie_either_way(tmp_path):
    base, _ = write(tmp_path / "adapter", Mixed, LoraConfig(r=2, target_modules=["first", "second", "last"]))
    with pytest.raises(CheckpointError, match=r"fan_in_fan_out does not hold for .*'second.weight', which is square"):
        merge(base, [tmp_path / "adapter"], WeightAverage())
