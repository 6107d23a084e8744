"""Experts of models with tied weights: each tensor is changed once, under any of its names."""

import copy
import logging

import pytest
import torch
from torch import nn

from freemerge.experts import Expert, PackedExpert, attached, by_first_names, extract, extract_low_rank
from freemerge.experts.running.groups import run_groups
from freemerge.experts.running.layerwise import substituted
from freemerge.experts.running.one_pass import fits_one_pass, in_one_pass
from freemerge.merging import task_vector
from freemerge.models import FreeModel, LanguageBackbone
from freemerge.training import ExpertTrainer
from tests.models.own_parts import ShiftExpert

TINY = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS = {
    "gpt2": {"model_type": "gpt2", **TINY, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16},
    "t5": {
        "model_type": "t5", **TINY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2,
        "decoder_start_token_id": 0, "tie_word_embeddings": True,
    },
    "bart": {
        "model_type": "bart", **TINY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
        "max_position_embeddings": 16, "decoder_start_token_id": 2,
    },
}  # fmt: skip
EMBEDDING = {"gpt2": "transformer.wte.weight", "t5": "shared.weight", "bart": "model.shared.weight"}
NAMES = {"gpt2": 2, "t5": 4, "bart": 4}


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def backbone_of(kind: str) -> LanguageBackbone:
    torch.manual_seed(0)
    return LanguageBackbone(config=CONFIGS[kind]).eval()


def names_of_the_embedding(model: nn.Module) -> list[str]:
    """All names of the embedding's storage."""
    state = model.state_dict()
    place = model.get_input_embeddings().weight.data_ptr()
    return [name for name, tensor in state.items() if tensor.data_ptr() == place]


def expert_of(backbone: LanguageBackbone, names: str, kind: str) -> Expert:
    """An expert of the embedding and one norm, under all names of the embedding or only its first or last."""
    own = names_of_the_embedding(backbone.model)
    own = {"all": own, "first": own[:1], "last": own[-1:]}[names]
    norm = next(name for name in backbone.weights() if "norm" in name or "ln_" in name)
    generator = torch.Generator().manual_seed(1)
    change = torch.randn(40, 16, generator=generator)
    residual = dict.fromkeys(own, change) | {norm: torch.randn(16, generator=generator)}
    expert = extract(residual, 0.5) if kind == "sparse" else extract_low_rank(residual, rank=2)
    return expert.with_values(expert.flat_values().bfloat16().float())  # so that packing is lossless


def changed_by_hand(backbone: LanguageBackbone, expert: Expert) -> LanguageBackbone:
    copied, dense = copy.deepcopy(backbone), expert.dense()
    own = names_of_the_embedding(copied.model)
    with torch.no_grad():
        copied.model.get_input_embeddings().weight += next(dense[name] for name in own if name in dense)
        for name in dense.keys() - set(own):
            copied.model.get_parameter(name).add_(dense[name])
    return copied


def some_inputs(kind: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 40, (3, 6), generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs if kind == "gpt2" else inputs | {"labels": ids.flip(1)[:, :4].contiguous()}


@torch.no_grad()
@pytest.mark.parametrize("expert_kind", ["sparse", "low_rank"])
@pytest.mark.parametrize("names", ["all", "first", "last"])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_every_way_of_running_changes_a_tied_weight_once(kind: str, names: str, expert_kind: str) -> None:
    backbone, inputs = backbone_of(kind), some_inputs(kind)
    assert len(names_of_the_embedding(backbone.model)) == NAMES[kind]  # otherwise the test shows nothing
    expert = expert_of(backbone, names, expert_kind)
    before = {name: tensor.clone() for name, tensor in backbone.weights().items()}
    expected = changed_by_hand(backbone, expert)(inputs)
    assert not torch.allclose(expected, backbone(inputs), atol=0.1)
    free = FreeModel(backbone, {"a": nn.Identity(), "b": nn.Identity()}, {"a": expert}).eval()
    model, found = backbone.model, {}
    with attached(model, expert):
        found["attached"] = backbone(inputs)
    with substituted(model, expert.shapes, expert.added):
        found["substituted"] = backbone(inputs)
    if expert_kind == "sparse":
        found["groups"] = run_groups(backbone, model, inputs, [(PackedExpert(expert), len(found["attached"]))])
    elif fits_one_pass(model, backbone, [(expert, 0)], inputs):
        with in_one_pass(model, [(PackedExpert(expert), 3)]):
            found["side by side"] = backbone(inputs)
    found["features"] = free.features(inputs, "a")
    found["task_model"] = free.task_model("a")(inputs)
    found["trainer"] = ExpertTrainer(copy.deepcopy(backbone), nn.Identity(), backbone.weights(), expert)(inputs)
    for way, logits in found.items():
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4, msg=way)
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.weights().items())
    plain = free.task_model("a").backbone.model
    assert len(names_of_the_embedding(plain)) == NAMES[kind]  # still tied


def test_a_tied_head_runs_in_one_pass_with_its_embedding() -> None:
    """GPT-2's head is a linear layer and its embedding is not; Hugging Face files name only the embedding."""
    backbone, inputs = backbone_of("gpt2"), some_inputs("gpt2")
    expert = expert_of(backbone, "first", "low_rank")
    expected, plain = changed_by_hand(backbone, expert)(inputs), backbone(inputs)
    assert fits_one_pass(backbone.model, backbone, [(expert, 0)], inputs)
    with in_one_pass(backbone.model, [(None, 2), (expert, 1)]):
        found = backbone(inputs)
    torch.testing.assert_close(found, torch.cat([plain[:2], expected[2:]]), atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("expert_kind", ["sparse", "low_rank"])
def test_experts_with_different_names_of_a_tied_weight_mix(expert_kind: str) -> None:
    backbone, inputs = backbone_of("gpt2"), some_inputs("gpt2")
    experts = {"a": expert_of(backbone, "first", expert_kind), "b": expert_of(backbone, "last", expert_kind)}
    free = FreeModel(backbone, {"a": nn.Identity(), "b": nn.Identity()}, experts, top_n=2).eval()
    found = free._grouped_features(inputs, [({"a": 0.5, "b": 0.25}, 3)])
    expected = changed_by_hand(backbone, experts["a"].scaled(0.75))(inputs)  # both change the same tensor
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_gradients_reach_an_expert_through_both_ends_of_a_tied_weight() -> None:
    backbone, inputs = backbone_of("gpt2"), some_inputs("gpt2")
    expert = expert_of(backbone, "first", "low_rank")
    trainer = ExpertTrainer(copy.deepcopy(backbone), nn.Identity(), backbone.weights(), expert)
    trainer(inputs).square().mean().backward()
    copied = copy.deepcopy(backbone).requires_grad_(False)
    values = expert.flat_values().requires_grad_()
    own = expert.with_values(values)
    weights = {f"model.{name}": tensor for name, tensor in copied.weights().items()}
    tied = names_of_the_embedding(copied.model)
    for name in expert.shapes:
        changed = own.added(name, copied.weights()[name])
        weights |= {f"model.{alias}": changed for alias in (tied if name in tied else [name])}
    torch.func.functional_call(copied, weights, (inputs,)).square().mean().backward()
    torch.testing.assert_close(trainer.values.grad, values.grad, atol=1e-6, rtol=1e-4)


def test_a_task_vector_is_tied_if_both_models_are_and_an_expert_has_it_once() -> None:
    tied, untied = torch.ones(3), {"a": torch.zeros(3), "b": torch.ones(3)}
    base = {"a": torch.zeros(3)}
    base["b"] = base["a"]
    both = task_vector(base, {"a": tied, "b": tied})
    assert both["a"] is both["b"]
    assert list(extract(both, 1.0).shapes) == ["a"]
    apart = task_vector(base, untied)
    assert apart["a"].tolist() == [0, 0, 0]
    assert apart["b"].tolist() == [1, 1, 1]


@torch.no_grad()
def test_a_user_made_expert_is_renamed_in_all_its_fields() -> None:
    weights = dict.fromkeys(("first", "last"), torch.zeros(2, 3))
    expert = ShiftExpert({"last": torch.ones(1)}, {"last": (2, 3)}, {"task": "a"})
    renamed = by_first_names(expert, weights)
    assert renamed.shapes == {"first": (2, 3)}
    assert renamed.shifts == {"first": expert.shifts["last"]}
    assert renamed.metadata == {"task": "a"}
