"""Low-rank experts as LoRA adapters: PEFT computes with them what the experts do."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from freemerge.experts import LowRankExpert, as_lora, extract_low_rank, write_into
from freemerge.models import LanguageBackbone
from tests.language_models import language_model, residual

IDS = torch.tensor([[5, 6, 7, 8, 9, 3], [10, 11, 12, 4, 13, 14]])


def write(folder: Path, model: nn.Module, expert: LowRankExpert) -> dict[str, Any]:
    adapter = as_lora(model, expert)
    folder.mkdir(parents=True)
    save_file(adapter.tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(adapter.config))
    return adapter.config


def outputs(backbone: LanguageBackbone, model: nn.Module) -> Tensor:
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    if backbone.kind == "seq2seq":
        given["decoder_input_ids"] = IDS
    with torch.no_grad():
        return model(**given).logits


def check(backbone: LanguageBackbone, experts: dict[str, LowRankExpert], folder: Path) -> None:
    """PEFT computes the same as each expert written into the weights, whichever adapter it switches to."""
    for task, expert in experts.items():
        write(folder / task, backbone.model, expert)
    first, *others = experts
    adapted = PeftModel.from_pretrained(copy.deepcopy(backbone.model), folder / first, adapter_name=first).eval()
    for task in others:
        adapted.load_adapter(folder / task, adapter_name=task)
    for task in (*experts, first):
        adapted.set_adapter(task)
        changed = copy.deepcopy(backbone)
        write_into(changed.weights(), experts[task])
        expected = outputs(backbone, changed.model)
        assert not torch.allclose(outputs(backbone, backbone.model), expected, atol=0.01)
        torch.testing.assert_close(outputs(backbone, adapted), expected, rtol=1e-4, atol=1e-4)


def chosen(backbone: LanguageBackbone, seed: int, *parts: str) -> dict[str, Tensor]:
    found = {name: tensor for name, tensor in residual(backbone, seed, 0.3).items() if any(p in name for p in parts)}
    assert all(any(part in name for name in found) for part in parts)
    return found


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("llama", ("q_proj", "down_proj")),
        ("llama", ("q_proj", "norm", "embed_tokens", "lm_head")),
        ("gpt2", ("c_attn.weight", "mlp.c_proj.weight")),
        ("gpt2", ("c_attn", "mlp.c_proj", "ln_1")),
        ("gpt2", ("c_attn.weight", "wte", "wpe")),  # the head is tied to the embedding
        ("gpt2", ("c_attn", "wpe")),  # a bias beside an embedding
        ("t5", ("SelfAttention.q", "EncDecAttention.v", "wo", "layer_norm", "relative_attention_bias")),
        ("t5", ("SelfAttention.q", "shared")),  # one tensor of three layers and, with another scale, of the head
        ("bart", ("q_proj", "fc1", "layer_norm")),
    ],
)
def test_peft_computes_the_same(kind: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    backbone = language_model(kind)
    experts = {t: extract_low_rank(chosen(backbone, s, *parts), rank=2) for s, t in enumerate("ab")}
    check(backbone, experts, tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_ranks_may_differ(kind: str, tmp_path: Path) -> None:
    backbone = language_model(kind)
    parts = ("q_proj", "up_proj") if kind == "llama" else ("c_attn.weight", "c_fc.weight")
    expert = extract_low_rank(chosen(backbone, 0, *parts), rank=3)
    for number, name in enumerate(expert.left):
        expert.left[name], expert.right[name] = expert.left[name][:, : number + 1], expert.right[name][: number + 1]
    config = write(tmp_path / "config", backbone.model, expert)
    assert config["r"] == 3
    assert set(config["rank_pattern"].values()) == {1, 2}
    check(backbone, {"a": expert}, tmp_path)


def test_whole_changes_of_weights_and_biases_alone(tmp_path: Path) -> None:
    backbone = language_model("gpt2")
    change = chosen(backbone, 0, "h.0.attn.c_attn.weight", "h.1.attn.c_proj.weight", "h.0.mlp.c_fc.bias")
    shapes = {name: tuple(tensor.shape) for name, tensor in change.items()}
    check(backbone, {"a": LowRankExpert({}, {}, change, shapes)}, tmp_path)


class Nested(nn.Module):
    """Layers whose names are the ends of others' names."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.fc, self.norm, self.block = nn.Linear(4, 4), nn.LayerNorm(4), inner or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.norm(self.fc(x)))


@pytest.mark.parametrize("ranks", [{"fc": 1}, {"block.fc": 1}, {"fc": 3, "block.fc": 1}, {"fc": 1, "block.fc": 3}])
def test_layers_whose_names_end_like_others(ranks: dict[str, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Nested(Nested()), torch.randn(3, 4)
    left = {f"{layer}.weight": torch.randn(4, rank) for layer, rank in ranks.items()}
    right = {f"{layer}.weight": torch.randn(rank, 4) for layer, rank in ranks.items()}
    expert = LowRankExpert(left, right, {}, dict.fromkeys(left, (4, 4)))
    write(tmp_path / "a", model, expert)
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a").eval()
    changed = copy.deepcopy(model)
    write_into(dict(changed.state_dict()), expert)
    torch.testing.assert_close(adapted(x), changed(x), rtol=1e-4, atol=1e-5)


def test_a_whole_layer_whose_name_ends_like_another_is_refused_by_name() -> None:
    expert = LowRankExpert({}, {}, {"norm.weight": torch.ones(4)}, {"norm.weight": (4,)})
    with pytest.raises(ValueError, match=r"tensor 'norm.weight' is of a layer whose name ends like 'block.norm'"):
        as_lora(Nested(Nested()), expert)


def test_only_linear_layers_are_served_by_every_server() -> None:
    llama, gpt2 = language_model("llama"), language_model("gpt2")
    assert as_lora(llama.model, extract_low_rank(chosen(llama, 0, "q_proj"), rank=2)).only_factors
    assert not as_lora(llama.model, extract_low_rank(chosen(llama, 0, "q_proj", "norm"), rank=2)).only_factors
    assert not as_lora(gpt2.model, extract_low_rank(chosen(gpt2, 0, "c_attn"), rank=2)).only_factors


def test_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1, groups=2))
    expert = extract_low_rank({"0.weight": torch.randn(8, 3, 3, 3)}, rank=2)
    tensors = as_lora(model, expert).tensors
    images, (inner, outer) = torch.randn(2, 3, 6, 6), tensors.values()
    expected = model[0](images) + nn.functional.conv2d(nn.functional.conv2d(images, inner), outer)
    changed = copy.deepcopy(model[0])
    changed.weight.data = expert.added("0.weight", changed.weight.detach())
    torch.testing.assert_close(changed(images), expected, rtol=1e-4, atol=1e-5)


def test_what_peft_cannot_say_is_refused_by_name() -> None:
    own = nn.Module()
    own.scale, own.inner = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)
    expert = LowRankExpert({}, {}, {"scale": torch.ones(3)}, {"scale": (3,)})
    with pytest.raises(
        ValueError, match=r"tensor 'scale' belongs to a layer with other layers inside.*exclude: \['scale'\]"
    ):
        as_lora(own, expert)
    grouped = nn.Sequential(nn.Conv2d(8, 8, 1, groups=2))
    expert = extract_low_rank({"0.weight": torch.randn(8, 4, 1, 1)}, rank=1)
    with pytest.raises(ValueError, match=r"tensor '0.weight' is of a Conv2d, no linear layer"):
        as_lora(grouped, expert)
    attention = nn.Sequential(nn.MultiheadAttention(4, 2))
    expert = extract_low_rank({"0.out_proj.weight": torch.randn(4, 4)}, rank=1)
    with pytest.raises(ValueError, match=r"tensor '0.out_proj.weight' is read by nn.MultiheadAttention itself"):
        as_lora(attention, expert)
    mamba = language_model("mamba")
    expert = extract_low_rank(chosen(mamba, 0, "A_log"), rank=1)
    with pytest.raises(ValueError, match=r"is of a MambaMixer.*exclude: \['backbone.layers.\*.mixer.A_log'\]"):
        as_lora(mamba.model, expert)
    layer = nn.Linear(3, 3)
    twice = nn.ModuleDict({"one": layer, "two": layer})
    expert = extract_low_rank({"one.weight": torch.randn(3, 3)}, rank=1)
    with pytest.raises(ValueError, match=r"tensor 'two.weight' is the same layer as 'one'"):
        as_lora(twice, expert)
