"""Recorded passes: padding, experts in one place, and what cannot be recorded. On a GPU: `tools/check_gpu.py`."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from freemerge.experts import PackedExpert, extract_low_rank
from freemerge.models.recorded import RecordedBackbone, record_graph
from tests.tiny import tiny_backbone, tiny_text_backbone


def rerun(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """What a graph does, without one: the same computation from and to the same memory."""
    result = run().clone()
    return lambda: result.copy_(run()), result


def packed_experts(backbone) -> list[PackedExpert]:
    experts = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        noise = {name: torch.randn(t.shape, generator=generator) for name, t in backbone.weights().items()}
        experts.append(PackedExpert(extract_low_rank(noise, rank=1)))
    return experts


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_recorded_passes_give_what_the_backbone_does() -> None:
    backbone = tiny_backbone().eval()
    recorded, recordings = RecordedBackbone(backbone, rerun), []
    for seed, count in enumerate((9, 10, 9, 7, 10, 1, 9)):
        batch = images(count, seed)
        torch.testing.assert_close(recorded(batch), backbone(batch))
        recordings.append(len(recorded._made))
    assert recordings == [0, 1, 1, 1, 1, 1, 1]  # 9 and 10 share one; other sizes came once


@torch.no_grad()
def test_weights_may_change_in_place_and_not_move() -> None:
    backbone = tiny_backbone().eval()
    recorded = RecordedBackbone(backbone, rerun)
    before = [recorded(images(4)) for _ in range(2)][-1]
    for parameter in backbone.parameters():
        parameter.mul_(0.5)
    assert recorded.current
    assert not torch.allclose(recorded(images(4)), before)
    torch.testing.assert_close(recorded(images(4)), backbone(images(4)))
    next(backbone.parameters()).data = next(backbone.parameters()).data.clone()
    assert not recorded.current


@torch.no_grad()
def test_low_rank_experts_take_turns_in_one_recording() -> None:
    backbone = tiny_backbone().eval()
    weights = copy.deepcopy(backbone.weights())
    first, second = packed_experts(backbone)
    recorded = RecordedBackbone(backbone, rerun)
    for expert in (first, second, first, second):
        unrecorded = RecordedBackbone(backbone, rerun)(images(5), expert)
        torch.testing.assert_close(recorded(images(5), expert), unrecorded)
    torch.testing.assert_close(recorded(images(5)), backbone(images(5)))
    assert len(recorded._made) == 1
    assert not torch.allclose(recorded(images(5), first), recorded(images(5), second))
    assert all(torch.equal(value, weights[name]) for name, value in backbone.weights().items())
    assert first.layout == second.layout


@torch.no_grad()
def test_texts_of_each_length_are_recorded_apart() -> None:
    backbone = tiny_text_backbone().eval()
    recorded = RecordedBackbone(backbone, rerun)
    for length in (5, 6, 5, 6):
        tokens = torch.randint(5, 20, (3, length), generator=torch.Generator().manual_seed(length))
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        torch.testing.assert_close(recorded(batch), backbone(batch))
    assert len(recorded._made) == 2


@torch.no_grad()
def test_what_cannot_be_recorded_runs_after_one_warning() -> None:
    def refuse(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    backbone = tiny_backbone().eval()
    recorded = RecordedBackbone(backbone, refuse)
    recorded(images(3))
    with pytest.warns(UserWarning, match=r"cannot be recorded as a CUDA graph .*\(operation not permitted"):
        torch.testing.assert_close(recorded(images(3)), backbone(images(3)))
    torch.testing.assert_close(recorded(images(3)), backbone(images(3)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_does_the_same_again() -> None:
    values = torch.arange(5.0, device="cuda")
    start, result = record_graph(lambda: values * 2)
    values += 1
    start()
    assert result.tolist() == [2, 4, 6, 8, 10]
