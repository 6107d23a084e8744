"""freemerge's files of every kind open after safetensors saved them again, with and without metadata."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from freemerge import FreeModel, merge
from freemerge.checkpoints import load_checkpoint
from freemerge.experts import extract, extract_low_rank
from freemerge.merging import TaskArithmetic, WeightAverage
from freemerge.models import ConvRouter
from freemerge_callbacks import MergeAtFitEnd, MultiTaskEvaluation, TaskCheckpoint, save_base
from tests.callbacks.callbacks_project import Plain, make_backbone, make_loader, make_trainer
from tests.tiny import tiny_backbone


def save_again(path: Path, with_metadata: bool) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata if with_metadata else None)


@pytest.fixture(params=[True, False], ids=["with metadata", "without"])
def again(request):
    return lambda path: save_again(path, request.param)


def test_a_kept_base_and_a_merged_file(tmp_path, again):
    base = save_base(Plain(), tmp_path / "base.safetensors")
    expected = make_backbone().state_dict()
    again(base)
    other = {name: tensor + 1 for name, tensor in expected.items()}
    merged = merge(base, [other], WeightAverage(), output=tmp_path / "merged.safetensors")
    again(merged)
    for path, shift in ((base, 0), (merged, 1)):
        found = load_checkpoint(path)
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[name], tensor + shift) for name, tensor in expected.items())


@pytest.mark.parametrize("save", ["weights", "task_vector"])
def test_a_task_file_in_a_merge_and_in_the_callbacks(tmp_path, again, save):
    task, output = tmp_path / "task.safetensors", tmp_path / "merged.safetensors"
    base = save_base(Plain(), tmp_path / "base.safetensors")
    first, second = Plain(), Plain()
    make_trainer(tmp_path, TaskCheckpoint(str(task), "a", save=save)).fit(first, make_loader(0))
    again(task)
    theirs = first.backbone.state_dict()
    merged = merge(base, [task], TaskArithmetic(1.0), exclude=["head.*"])
    assert all(torch.allclose(merged[name], tensor, atol=1e-6) for name, tensor in theirs.items())
    combine = MergeAtFitEnd(WeightAverage(), [str(task)], str(output), base=str(base), exclude=["head.*"])
    evaluate = MultiTaskEvaluation({"a": make_loader(0), "b": make_loader(1)}, {"a": str(task)})
    make_trainer(tmp_path, combine, evaluate).fit(second, make_loader(1))
    own, found = second.backbone.state_dict(), load_checkpoint(output)
    assert all(torch.allclose(found[name], (own[name] + tensor) / 2, atol=1e-6) for name, tensor in theirs.items())
    expected = make_backbone()
    expected.load_state_dict(found)
    inputs, labels = make_loader(0).dataset.tensors
    right = first.head(expected(inputs)).argmax(1) == labels
    assert evaluate.results["a"] == pytest.approx(float(right.float().mean()))


def test_a_free_model_with_experts_router_and_heads(tmp_path, again):
    torch.manual_seed(0)
    backbone = tiny_backbone()
    residual = {name: torch.randn(tensor.shape) for name, tensor in backbone.weights().items()}
    experts = {"a": extract(residual, 0.1), "b": extract_low_rank(residual, rank=2)}
    heads = {"a": nn.Linear(16, 3), "b": nn.Linear(16, 2)}
    model = FreeModel(backbone, heads, experts, ConvRouter(2, 1)).eval()
    model.save_pretrained(tmp_path / "model")
    images = torch.randn(4, 1, 8, 8)
    expected = FreeModel.from_pretrained(tmp_path / "model")
    files = list((tmp_path / "model").rglob("*.safetensors"))
    assert len(files) >= 4
    for path in files:
        again(path)
    found = FreeModel.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        for task in heads:
            assert torch.equal(found(images, task=task).logits, expected(images, task=task).logits)
        assert torch.equal(found(images).logits, expected(images).logits)
