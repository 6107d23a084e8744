"""Heads by cosine: against transformers' own outputs, and against means that the tests write out."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from freemerge.models import (
    CosineHead,
    FreeModel,
    ModuleBackbone,
    TransformersBackbone,
    head_from_state,
    prototypes,
)
from freemerge.models.class_heads import class_embeddings
from tests.configs import tiny_files
from tests.configs.test_configs import BERT, VIT

NAMES, TEMPLATES = ["red", "good_blue", "bad"], ["a photo of the {}", "{}"]
TOKENS = {
    "input_ids": torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]]),
    "attention_mask": torch.tensor([[1] * 4, [1] * 3 + [0]]),
}
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path) -> str:
    """A tiny text encoder with its tokenizer, as the hub has them."""
    torch.manual_seed(0)
    TransformersBackbone(config=BERT, pooling="pooler").save_pretrained(tmp_path / "encoder")
    return tiny_files.write_tokenizer(tmp_path / "encoder")


@torch.no_grad()
def pooled(folder: str, text: str, pooling: str) -> Tensor:
    """The features (F,) of one text, as transformers alone gives them."""
    model = AutoModel.from_pretrained(folder).eval()
    output = model(**AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt"))
    states = output.last_hidden_state[0]
    return {"mean": states.mean(dim=0), "cls": states[0], "pooler": output.pooler_output[0]}[pooling]


def test_a_head_by_cosine_keeps_float32_under_autocast() -> None:
    """Two classes 0.004 apart in their logits: bfloat16 has no value between 19.875 and 20."""
    head = CosineHead.of(torch.tensor([[1.0, 0.02], [1.0, 0.0]]))
    features = torch.tensor([[1.0, 0.0]])
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(features)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, torch.tensor([[20 / (1 + 0.02**2) ** 0.5, 20.0]]))
    with torch.autocast("cpu", torch.bfloat16):
        assert head(features.bfloat16()).dtype == torch.float32
    assert head.to("meta")(features.to("meta")).shape == (1, 2)


def test_underscores_are_spaces_unless_they_stand_between_two() -> None:
    seen: list[str] = []

    def embed(texts: list[str]) -> torch.Tensor:
        seen.extend(texts)
        return torch.ones(len(texts), 2)

    class_embeddings(embed, ["hot_dog", "a _ b", "_x_"], ["the {}!"])
    assert seen == ["the hot dog!", "the a _ b!", "the  x !"]


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
def test_a_zero_shot_head_is_the_cosine_with_the_class_names_in_prompts(folder: str, pooling: str) -> None:
    backbone = TransformersBackbone(folder, pooling=pooling)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    head = backbone.class_head(NAMES, TEMPLATES, tokenizer)
    directions = []
    for name in ("red", "good blue", "bad"):
        one, other = pooled(folder, f"a photo of the {name}", pooling), pooled(folder, name, pooling)
        directions.append(one / one.norm() + other / other.norm())
    expected = []
    for text in ("it is good", "what is red and green"):
        feature = pooled(folder, text, pooling)
        expected.append([20 * F.cosine_similarity(feature, direction, dim=0) for direction in directions])
    inputs = dict(tokenizer(["it is good", "what is red and green"], padding=True, return_tensors="pt"))
    torch.testing.assert_close(head(backbone.eval()(inputs)), torch.tensor(expected), atol=2e-5, rtol=1e-5)
    scaled = backbone.class_head(NAMES, TEMPLATES, tokenizer, scale=5.0)
    torch.testing.assert_close(scaled(backbone(inputs)), torch.tensor(expected) / 4, atol=2e-5, rtol=1e-5)


def test_a_zero_shot_head_is_frozen_and_leaves_the_encoder_in_its_mode(folder: str) -> None:
    backbone = TransformersBackbone(folder, pooling="mean").train()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    head = backbone.class_head(NAMES, TEMPLATES, tokenizer)
    assert backbone.training
    assert backbone.model.training
    assert not any(parameter.requires_grad for parameter in head.parameters())
    again = backbone.class_head(NAMES, TEMPLATES, tokenizer)  # no dropout while prompts are embedded
    assert torch.equal(again.weight, head.weight)


def test_many_prompts_are_embedded_in_parts(folder: str) -> None:
    backbone, tokenizer = TransformersBackbone(folder, pooling="mean"), AutoTokenizer.from_pretrained(folder)
    templates = ["a photo of the {}", "{} yes no", "what is {}"]
    names = [f"{first} {second}" for first in tiny_files.WORDS[4:] for second in tiny_files.WORDS[4:]][:150]
    head = backbone.class_head(names, templates, tokenizer)  # 450 prompts
    for index in (0, 85, 86, 149):
        alone = backbone.class_head([names[index]], templates, tokenizer)
        torch.testing.assert_close(head.weight[index], alone.weight[0])


def test_what_reads_no_texts_makes_no_zero_shot_head() -> None:
    assert TransformersBackbone(config=BERT).reads_texts
    assert not TransformersBackbone(config=VIT).reads_texts
    with pytest.raises(ValueError, match="this TransformersBackbone needs the tokenizer of a task of texts"):
        TransformersBackbone(config=VIT).class_head(["red"], ["{}"])


# ---- prototypes


class Counted(nn.Module):
    """Features are the inputs themselves; counts how many samples it has seen."""

    num_features = 2
    seen = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen += len(inputs)
        return inputs


def test_prototypes_are_means_of_the_first_samples_of_each_class() -> None:
    module = Counted()
    inputs = torch.tensor([[1.0, 0], [0, 2], [3, 0], [0, 6], [100, 100], [5, 1], [7, 7]])
    labels = torch.tensor([0, 1, 0, 1, 0, 2, 2])
    batches = [(inputs[:3], labels[:3]), (inputs[3:5], labels[3:5]), (inputs[5:], labels[5:]), (inputs, labels)]
    found = prototypes(ModuleBackbone(module), batches, num_classes=3, per_class=2, device=CPU)
    torch.testing.assert_close(found, torch.tensor([[2.0, 0], [0, 4], [6, 4]]))
    assert module.seen == 6  # the third of class 0 is not asked for, and the last batch not at all


def test_a_class_with_few_samples_has_them_all_and_one_without_is_an_error() -> None:
    backbone = ModuleBackbone(Counted())
    batches = [(torch.tensor([[1.0, 0], [0, 2], [3, 0]]), torch.tensor([0, 1, 0]))]
    found = prototypes(backbone, batches, num_classes=2, per_class=16, device=CPU)
    torch.testing.assert_close(found, torch.tensor([[2.0, 0], [0, 2]]))
    with pytest.raises(ValueError, match="no training sample is of class 2, 3; use another head"):
        prototypes(backbone, batches, num_classes=4, per_class=16, device=CPU)


def test_prototypes_of_texts_do_not_depend_on_the_batches(folder: str) -> None:
    backbone = TransformersBackbone(folder, pooling="mean")
    alone = [
        ({name: tensor[row : row + 1] for name, tensor in TOKENS.items()}, torch.tensor([row])) for row in range(2)
    ]
    together = prototypes(backbone, [(TOKENS, torch.tensor([0, 1]))], 2, 4, CPU)
    torch.testing.assert_close(together, prototypes(backbone, alone, 2, 4, CPU))
    torch.testing.assert_close(together, backbone.eval()(TOKENS))


# ---- as a head


def test_a_cosine_head_is_written_out() -> None:
    head = CosineHead.of(torch.tensor([[3.0, 4.0], [0.0, -2.0]]), scale=10.0)
    logits = head(torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    expected = torch.tensor([[6.0, 0.0], [10 * 7 / (5 * 2**0.5), -10 / 2**0.5], [0.0, 0.0]])
    torch.testing.assert_close(logits, expected)
    again = head_from_state(head.state_dict())
    assert isinstance(again, CosineHead)
    assert torch.equal(again(torch.tensor([[2.0, 0.0]])), logits[:1])
    linear = nn.Linear(2, 3)
    assert type(head_from_state(linear.state_dict())) is nn.Linear


def test_a_model_with_cosine_heads_is_saved_and_loaded_whole(folder: str, tmp_path) -> None:
    backbone, tokenizer = TransformersBackbone(folder, pooling="mean").eval(), AutoTokenizer.from_pretrained(folder)
    heads = {
        "colours": backbone.class_head(["red", "green"], ["{}"], tokenizer),
        "shapes": CosineHead.of(torch.randn(3, backbone.feature_dim), scale=3.0),
        "others": nn.Linear(backbone.feature_dim, 2),
    }
    model = FreeModel(backbone, heads).eval()
    model.save_pretrained(tmp_path / "free")
    again = FreeModel.from_pretrained(tmp_path / "free").eval()
    for task in heads:
        assert torch.equal(again(TOKENS, task=task).logits, model(TOKENS, task=task).logits)
        assert type(again.heads[task]) is type(heads[task])
