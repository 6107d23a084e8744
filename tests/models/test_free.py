"""FreeModel: routing, grouping, exact restoration, and its folder."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from freemerge.checkpoints import CheckpointError
from freemerge.experts import attached, extract
from freemerge.models import ConvRouter, FreeModel
from tests.tiny import tiny_backbone


@pytest.fixture
def model(images: torch.Tensor) -> FreeModel:
    torch.manual_seed(0)
    backbone = tiny_backbone().eval()
    experts = {}
    for seed, task in enumerate(("a", "b")):
        generator = torch.Generator().manual_seed(seed)
        noise = {name: torch.randn(t.shape, generator=generator) for name, t in backbone.weights().items()}
        expert = extract(noise, 0.05)
        experts[task] = expert.with_values(expert.flat_values().bfloat16().float())  # as a file stores them
    heads = {"a": nn.Linear(16, 3), "b": nn.Linear(16, 5), "c": nn.Linear(16, 2)}
    router = ConvRouter(3, channels=1, width=4).eval()
    with torch.no_grad():  # untrained, it would send every image to one task
        router.head.bias -= router(images).mean(dim=0)
    return FreeModel(backbone, heads, experts, router, {"a": ["x", "y", "z"]}).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def by_hand(model: FreeModel, images: torch.Tensor, task: str) -> torch.Tensor:
    if task not in model.experts:
        return model.heads[task](model.backbone(images))
    with attached(model.backbone.model, model.experts[task]):
        return model.heads[task](model.backbone(images))


@torch.no_grad()
def test_a_named_task_uses_its_expert_and_head(model: FreeModel, images: torch.Tensor) -> None:
    for index, (task, classes) in enumerate((("a", 3), ("b", 5), ("c", 2))):
        output = model(images, task=task)
        assert output.task.tolist() == [index] * len(images)
        assert output.router_logits is None
        assert output.logits.shape == (40, 5)
        assert torch.equal(output.logits[:, :classes], by_hand(model, images, task))
        assert bool((output.logits[:, classes:] == float("-inf")).all())
        assert torch.equal(output.labels, by_hand(model, images, task).argmax(dim=1))


@torch.no_grad()
def test_a_mixed_batch_gives_each_sample_what_its_task_would(model: FreeModel, images: torch.Tensor) -> None:
    output = model(images)
    assert torch.equal(output.task, model.router(images).argmax(dim=1))
    assert len(output.task.unique()) > 1  # else this shows nothing
    for i, name in enumerate(output.task_names):
        alone = model(images[i : i + 1], task=name)
        torch.testing.assert_close(output.logits[i], alone.logits[0])


@torch.no_grad()
def test_the_merged_weights_come_back_bit_for_bit(model: FreeModel, images: torch.Tensor) -> None:
    model = model.to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.backbone.weights().items()}
    for _ in range(20):
        model(images.bfloat16())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.backbone.weights().items())


@torch.no_grad()
def test_batches_of_one_and_none(model: FreeModel, images: torch.Tensor) -> None:
    assert model(images[:1]).logits.shape == (1, 5)
    empty = model(images[:0])
    assert empty.logits.shape == (0, 5)
    assert empty.task_names == []
    assert model(images[:0], task="a").labels.shape == (0,)


def test_refusals(model: FreeModel, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="unknown task 'd'; tasks: a, b, c"):
        model(images, task="d")
    with pytest.raises(ValueError, match="no router; name the task"):
        FreeModel(model.backbone, dict(model.heads))(images)
    with pytest.raises(ValueError, match="an expert for 'z' but no head"):
        FreeModel(model.backbone, dict(model.heads), {"z": model.experts["a"]})
    with pytest.raises(ValueError, match="the router knows 3 tasks, there are 1 heads"):
        FreeModel(model.backbone, {"a": model.heads["a"]}, router=model.router)
    with pytest.raises(ValueError, match="the model has no tensor 'nowhere'"):
        FreeModel(model.backbone, dict(model.heads), {"a": extract({"nowhere": torch.ones(3)}, 1.0)})


@torch.no_grad()
def test_the_folder_round_trips(tmp_path, model: FreeModel, images: torch.Tensor) -> None:
    model.save_pretrained(tmp_path / "m")
    again = FreeModel.from_pretrained(tmp_path / "m")
    assert again.tasks == model.tasks
    assert again.class_names == model.class_names
    for task in (None, "a", "c"):
        assert torch.equal(again(images, task=task).logits, model(images, task=task).logits)
    plain = AutoModel.from_pretrained(tmp_path / "m", add_pooling_layer=False)
    assert torch.equal(plain.state_dict()["layernorm.weight"], model.backbone.weights()["layernorm.weight"])


def test_files_that_do_not_belong_together_are_refused(tmp_path, model: FreeModel) -> None:
    with pytest.raises(CheckpointError, match=r"not a FREE model \(no freemerge.json\)"):
        FreeModel.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "layernorm.weight": weights["layernorm.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="the folder's files do not belong together"):
        FreeModel.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    description = json.loads((tmp_path / "freemerge.json").read_text())
    (tmp_path / "freemerge.json").write_text(json.dumps({**description, "format": "other"}))
    with pytest.raises(CheckpointError, match="format 'other'"):
        FreeModel.from_pretrained(tmp_path)


def test_an_expert_of_other_merged_weights_is_refused(tmp_path, model: FreeModel) -> None:
    model.save_pretrained(tmp_path / "m")
    shifted = {name: tensor + 1e-3 for name, tensor in model.backbone.weights().items()}
    model.backbone.load_weights(shifted)
    model.save_pretrained(tmp_path / "n")
    expert = tmp_path / "m" / "experts" / "a.safetensors"
    expert.write_bytes((tmp_path / "n" / "experts" / "a.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"a\.safetensors: this expert belongs to merged weights"):
        FreeModel.from_pretrained(tmp_path / "m")
