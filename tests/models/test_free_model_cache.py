"""FreeModel: the cache of changed weights."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from freemerge.experts import emr_experts, extract, extract_low_rank
from freemerge.models import EarlyRouter, FreeModel
from tests.tiny import tiny_backbone

TASKS = "abcd"


def make_model() -> FreeModel:
    """Tasks a and b with sparse experts, c with a low-rank one, d with a mask."""
    torch.manual_seed(0)
    backbone, residuals = tiny_backbone().eval(), {}
    for seed, task in enumerate(TASKS):
        generator = torch.Generator().manual_seed(seed)
        residuals[task] = {n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in backbone.weights().items()}
    experts = {"a": extract(residuals["a"], 0.2), "b": extract(residuals["b"], 0.2)}
    experts |= {"c": extract_low_rank(residuals["c"], rank=2), "d": emr_experts(residuals)[1]["d"]}
    heads = {task: nn.Linear(16, 3) for task in TASKS}
    return FreeModel(backbone, heads, experts, EarlyRouter(4, "embeddings", 16, hidden=0), top_n=1).eval()


def logits(model: FreeModel, images: Tensor) -> Tensor:
    """The logits of each task, then of a routed batch."""
    with torch.no_grad():
        return torch.cat([*(model(images, task=task).logits for task in TASKS), model(images).logits])


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("top_n", [1, 2])
def test_results_are_the_same_with_and_without_the_cache(images: Tensor, top_n: int) -> None:
    model = make_model()
    model.top_n = top_n
    model.cache_bytes = 0
    without = logits(model, images)
    assert model.cached_bytes == 0
    model.cache_bytes = 1 << 20
    for _ in range(2):
        assert torch.equal(logits(model, images), without)
        assert 0 < model.cached_bytes <= 1 << 20
    with pytest.raises(ValueError, match="cache_bytes must not be negative"):
        model.cache_bytes = -1


def test_the_cache_is_not_part_of_the_model(images: Tensor) -> None:
    model = make_model()
    assert model.cache_bytes == 64 << 20
    keys, parameters, buffers = list(model.state_dict()), len(list(model.parameters())), len(list(model.buffers()))
    size = len(pickle.dumps(model))
    found = logits(model, images)
    assert model.cached_bytes
    assert list(model.state_dict()) == keys
    assert (len(list(model.parameters())), len(list(model.buffers()))) == (parameters, buffers)
    assert len(pickle.dumps(model)) == size
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        assert other.cached_bytes == 0
        assert torch.equal(logits(other, images), found)
    assert model.cached_bytes


def test_moving_and_loading_empty_the_cache(images: Tensor) -> None:
    model, other = make_model(), make_model()
    with torch.no_grad():
        for parameter in other.backbone.parameters():
            parameter.mul_(1.5)
    logits(model, images)
    model.load_state_dict(other.state_dict())
    assert model.cached_bytes == 0
    assert torch.equal(logits(model, images), logits(other, images))
    assert model.cached_bytes
    model.double()
    assert model.cached_bytes == 0
    assert torch.equal(logits(model, images.double()), logits(other.double(), images.double()))


def test_models_that_share_a_backbone_notice_its_changes(images: Tensor) -> None:
    model = make_model()
    other = FreeModel(model.backbone, dict(model.heads.items()), model.packed_experts, model.router).eval()
    logits(model, images)
    other.load_state_dict({key: t * 2 if key.startswith("backbone.") else t for key, t in other.state_dict().items()})
    expected = logits(copy.deepcopy(model), images)
    assert torch.equal(logits(model, images), expected)
    assert torch.equal(logits(other, images), expected)
