"""Switching experts: attached sums are exact, and the merged weights are restored bit for bit."""

import random

import pytest
import torch
from torch import nn

from freemerge.experts import ExpertSwitch, attached, extract


def module(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 3)).to(dtype)


def experts(model: nn.Module, count: int = 3) -> list:
    result = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        noise = {name: torch.randn(t.shape, generator=generator) for name, t in model.state_dict().items()}
        result.append(extract(noise, 0.2))
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_thousands_of_switches_change_no_bit(dtype: torch.dtype) -> None:
    model = module(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    switch, pool, choose = ExpertSwitch(model.state_dict()), experts(model), random.Random(0)
    for _ in range(2000):
        switch.attach(choose.choice(pool))
        if choose.random() < 0.3:
            switch.detach()
    switch.detach()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attached_weights_are_the_float32_sum_rounded_once(dtype: torch.dtype) -> None:
    model, expert = module(dtype), experts(module(dtype))[0]
    dense = expert.dense()
    expected = {
        name: (t.float() + dense[name]).to(dtype) if name in dense else t.clone()
        for name, t in model.state_dict().items()
    }
    with attached(model, expert):
        assert all(torch.equal(expected[name], tensor) for name, tensor in model.state_dict().items())


def test_an_exception_in_the_block_restores_the_weights() -> None:
    model = module(torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), attached(model, experts(model)[0]):
        raise RuntimeError("inside")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_expert_that_does_not_match_changes_nothing() -> None:
    model = module(torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    switch = ExpertSwitch(model.state_dict())
    with pytest.raises(ValueError, match=r"the model has no tensor '9\.weight'"):
        switch.attach(extract({"0.bias": torch.ones(8), "9.weight": torch.ones(2)}, 1.0))
    with pytest.raises(ValueError, match=r"task 'x': tensor '0\.bias' has shape \(8,\) in the model, .* \(4,\)"):
        switch.attach(extract({"0.bias": torch.ones(4)}, 1.0, metadata={"task": "x"}))
    assert not switch.attached
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
