"""One buffer for all weights: the same sums as tensor by tensor, and not a bit lost however often experts switch."""

import copy
import random

import pytest
import torch
from torch import nn

from freemerge.experts import SparseExpert, attached, extract, load_expert, save_expert
from freemerge.experts.flat import FlatWeights
from freemerge.experts.packed import PackedExpert


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20), nn.Linear(20, 5)).to(dtype).eval()


def experts_of(module: nn.Module, count: int, tmp_path) -> list[SparseExpert]:
    """As files have them."""
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        noise = {name: torch.randn(t.shape, generator=generator) for name, t in module.state_dict().items()}
        expert = extract({name: t for name, t in noise.items() if "tracked" not in name}, 0.1)
        found.append(load_expert(save_expert(tmp_path / f"{seed}.safetensors", expert)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ten_thousand_random_switches_leave_every_bit(dtype: torch.dtype, tmp_path) -> None:
    module = network(dtype)
    before = copy.deepcopy(module.state_dict())
    flat = FlatWeights(module)
    packed = [PackedExpert(expert) for expert in experts_of(module, 8, tmp_path)]
    choose = random.Random(0)
    for _ in range(10_000):
        with flat.attached(choose.choice(packed)):
            pass
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_attached_expert_is_the_sum_rounded_once(dtype: torch.dtype, tmp_path) -> None:
    module, (expert,) = network(dtype), experts_of(network(dtype), 1, tmp_path)
    with attached(copy.deepcopy(module), expert) as reference:
        expected = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    parameters = list(module.parameters())
    flat = FlatWeights(module)
    assert all(ours is own for ours, own in zip(module.parameters(), parameters, strict=True))
    with flat.attached(PackedExpert(expert)):
        assert all(torch.equal(expected[name], tensor) for name, tensor in module.state_dict().items())


def test_tied_weights_change_once_and_several_dtypes_each_in_their_buffer() -> None:
    module = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False), "c": nn.LayerNorm(4)})
    module["b"].weight = module["a"].weight
    module["c"].to(torch.bfloat16)
    before = copy.deepcopy(module.state_dict())
    flat = FlatWeights(module)
    expert = extract({"a.weight": torch.ones(4, 4), "b.weight": torch.ones(4, 4), "c.weight": torch.ones(4)}, 1.0)
    with flat.attached(PackedExpert(expert)):
        assert module["a"].weight is module["b"].weight
        assert torch.equal(module["a"].weight, before["a.weight"] + 1)
        assert torch.equal(module["c"].weight, before["c.weight"] + 1)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_it_is_stale_after_the_weights_have_moved() -> None:
    module = network(torch.float32)
    flat = FlatWeights(module)
    assert flat.current
    module.load_state_dict({name: tensor + 0 for name, tensor in module.state_dict().items()})
    assert flat.current  # copied into the same memory
    module.to(torch.bfloat16)
    assert not flat.current


def test_packing_loses_nothing_and_takes_few_bytes(tmp_path) -> None:
    module = network(torch.float32)
    (from_file,) = experts_of(module, 1, tmp_path)
    for expert in (from_file, extract({"w": torch.randn(300, 300)}, 0.01)):
        packed = PackedExpert(expert)
        again = packed.unpacked()
        assert all(torch.equal(again.indices[name], expert.indices[name]) for name in expert.indices)
        assert torch.equal(again.flat_values(), expert.flat_values())
    assert PackedExpert(from_file).num_bytes <= 2.2 * from_file.num_values + 4 * len(from_file.shapes)
    assert packed.num_bytes <= 5.2 * expert.num_values + 4  # values that int8 and bf16 would change stay float32
