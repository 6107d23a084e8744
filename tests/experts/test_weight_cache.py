"""The cache of changed weights for later passes."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from freemerge.experts import Expert, PackedExpert, WeightCache, emr_experts, extract, extract_low_rank, run_groups

MIB = 1 << 20


def make_module() -> nn.Module:
    """A module with batch norm, whose statistics experts also change, and two layers that share a weight."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3)).eval()
    module[3].weight = module[0].weight
    module[1].running_mean.normal_()
    return module


def make_experts(module: nn.Module, kind: str = "sparse", count: int = 3) -> list[Expert]:
    residuals = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        floats = {name: t for name, t in module.state_dict().items() if t.is_floating_point() and name != "3.weight"}
        residuals.append({name: 0.1 * torch.rand(t.shape, generator=generator) for name, t in floats.items()})
    if kind == "masked":
        return list(emr_experts({str(index): residual for index, residual in enumerate(residuals)})[1].values())
    if kind == "sparse":
        return [extract(residual, 0.9, exclude=None) for residual in residuals]
    return [extract_low_rank(residual, rank=2, exclude=None) for residual in residuals]


def expected_of(module: nn.Module, expert: Expert, inputs: Tensor) -> Tensor:
    """The result of a copy with the changed weights."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        changed = {name: expert.added(name, t) for name, t in other.state_dict().items() if name in expert.shapes}
    other.load_state_dict(changed, strict=False)
    with torch.no_grad():
        return other(inputs)


def run(module: nn.Module, packed: list[PackedExpert], inputs: Tensor, cache: WeightCache | None) -> Tensor:
    with torch.no_grad():
        groups = [(expert, 2) for expert in packed]
        return run_groups(module, module, inputs, groups, one_pass=False, cache=cache)


@pytest.mark.parametrize("kind", ["sparse", "low_rank", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_equal_passes_without_the_cache_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    module, cache = make_module().to(dtype), WeightCache(MIB)
    packed, inputs = [PackedExpert(expert) for expert in make_experts(module, kind)], torch.randn(6, 6, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    without = run(module, packed, inputs, None)
    for _ in range(3):
        assert torch.equal(run(module, packed, inputs, cache), without)
        with torch.inference_mode():
            groups = [(expert, 2) for expert in packed]
            assert torch.equal(run_groups(module, module, inputs, groups, one_pass=False, cache=cache), without)
    parts = [expected_of(module, one.unpacked(), part) for one, part in zip(packed, inputs.split(2), strict=True)]
    assert torch.equal(without, torch.cat(parts))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert cache.num_bytes > sum(tensor.nbytes for tensor in module.parameters())


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "an optimizer's step": lambda module: torch.optim.SGD(module.parameters(), lr=1.0).step(),
    "in place": lambda module: module[0].weight.mul_(2),
    "through .data": lambda module: module[0].weight.data.mul_(2),
    "through numpy": lambda module: module[4].bias.detach().numpy().__iadd__(1),
    "other data": lambda module: setattr(module[0].weight, "data", torch.randn(6, 6)),
    "a buffer": lambda module: module[1].running_mean.add_(1),
    "another parameter": lambda module: setattr(module[4], "weight", nn.Parameter(torch.randn(3, 6))),
    "another layer": lambda module: module.__setitem__(4, nn.Linear(6, 3)),
    "load_state_dict": lambda module: module.load_state_dict({k: v * 2 for k, v in module.state_dict().items()}),
    "load_state_dict, assigned": lambda module: module.load_state_dict(
        {k: v * 2 for k, v in module.state_dict().items()}, assign=True
    ),
    "another dtype": lambda module: module.double(),
    "training": lambda module: module.train(),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_the_cache_notices_every_change_of_the_model(change: str) -> None:
    module, cache = make_module(), WeightCache(MIB)
    experts, inputs = make_experts(module), torch.randn(6, 6)
    packed = [PackedExpert(expert) for expert in experts]
    run(module, packed, inputs, cache)
    assert cache.num_bytes
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    CHANGES[change](module)
    inputs = inputs.to(module[0].weight.dtype)
    parts = [expected_of(module, expert, part) for expert, part in zip(experts, inputs.split(2), strict=True)]
    for _ in range(2):
        assert torch.equal(run(module, packed, inputs, cache), torch.cat(parts))


@torch.no_grad()
def test_the_cache_notices_changed_and_deleted_experts() -> None:
    module, cache = make_module(), WeightCache(MIB)
    packed, inputs = [PackedExpert(expert) for expert in make_experts(module)], torch.randn(6, 6)
    first = run(module, packed, inputs, cache)
    packed[1].scales.mul_(2)
    packed[2].codes.zero_()
    found = run(module, packed, inputs, cache)
    assert torch.equal(found, run(module, packed, inputs, None))
    assert torch.equal(found[:2], first[:2])
    assert not torch.equal(found[2:4], first[2:4])
    held = cache.num_bytes
    del packed[1:]
    gc.collect()
    assert cache.num_bytes < held / 2


@torch.no_grad()
def test_the_shared_task_vector_of_masked_experts_may_change() -> None:
    module, cache = make_module(), WeightCache(MIB)
    packed, inputs = [PackedExpert(expert) for expert in make_experts(module, "masked")], torch.randn(6, 6)
    run(module, packed, inputs, cache)
    packed[0].shared["4.weight"].neg_()
    assert torch.equal(run(module, packed, inputs, cache), run(module, packed, inputs, None))


def test_the_cache_respects_its_limit_and_evicts_the_least_recent() -> None:
    module = make_module()
    packed, inputs = [PackedExpert(expert) for expert in make_experts(module, count=6)], torch.randn(12, 6)
    without = run(module, packed, inputs, None)
    large = WeightCache(MIB)
    run(module, packed[:2], inputs[:4], large)
    two = large.num_bytes
    cache = WeightCache(two)
    for _ in range(3):
        assert torch.equal(run(module, packed, inputs, cache), without)
        assert two // 2 < cache.num_bytes <= two
    for _ in range(300):  # the others are no longer recent
        run(module, packed[4:5], inputs[8:10], cache)
    assert packed[4] in cache._entries
    assert cache.num_bytes <= two
    assert torch.equal(run(module, packed, inputs, cache), without)
    for limit in (0, 100):
        small = WeightCache(limit)
        assert torch.equal(run(module, packed, inputs, small), without)
        assert small.num_bytes == 0


def test_nothing_is_cached_while_gradients_are_computed() -> None:
    module, cache = make_module(), WeightCache(MIB)
    expert, inputs = PackedExpert(make_experts(module)[0]), torch.randn(2, 6)
    run(module, [expert], inputs, cache)
    for used in (cache, None):
        module.zero_grad()
        run_groups(module, module, inputs, [(expert, 2)], cache=used).square().sum().backward()
        grads = [parameter.grad.clone() for parameter in module.parameters()]
        if cache is not None:
            found = grads
    assert all(map(torch.equal, found, grads))
    assert any(grad.any() for grad in grads)


def test_autocast_has_separate_entries() -> None:
    module, cache = make_module(), WeightCache(MIB)
    packed, inputs = [PackedExpert(expert) for expert in make_experts(module, "low_rank")], torch.randn(6, 6)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(run(module, packed, inputs, cache), run(module, packed, inputs, None))
        assert torch.equal(run(module, packed, inputs, cache), run(module, packed, inputs, None))


class Scribbling(nn.Module):
    """Writes to its own parameter and buffer in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("sum", torch.zeros(3))

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        self.sum.add_(inputs.sum(0))
        self.layer.bias.add_(1)
        return self.layer(inputs) + self.sum


@torch.no_grad()
def test_a_pass_that_writes_to_its_tensors_does_not_change_the_next_one() -> None:
    module, cache, inputs = Scribbling(), WeightCache(MIB), torch.randn(2, 3)
    residual = {name: torch.rand(tensor.shape) for name, tensor in module.state_dict().items()}
    expert = PackedExpert(extract(residual, 1.0))
    first = run(module, [expert], inputs, cache)
    for _ in range(2):
        assert torch.equal(run(module, [expert], inputs, cache), first)
    assert not module.sum.any()


@torch.no_grad()
def test_statistics_of_a_pass_do_not_enter_the_cache() -> None:
    """Another thread may use the cached tensors at the same time."""
    module, cache = make_module().train(), WeightCache(MIB)
    expert = PackedExpert(make_experts(module)[0])
    run(module, [expert], torch.randn(2, 6), cache)
    changed = cache._entries[expert].changed["1.running_mean"]
    mean = changed.clone()
    run(module, [expert], torch.randn(2, 6), cache)
    assert cache._entries[expert].changed["1.running_mean"] is changed
    assert torch.equal(changed, mean)


@torch.no_grad()
def test_a_weight_that_overflows_is_an_error_every_time() -> None:
    module, cache = nn.Linear(2, 2).half(), WeightCache(MIB)
    expert = PackedExpert(extract({"bias": torch.full((2,), 1e6)}, 1.0))
    for _ in range(2):
        with pytest.raises(OverflowError, match="float16"):
            run(module, [expert], torch.ones(2, 2).half(), cache)
    assert cache.num_bytes == 0


@pytest.mark.parametrize("room", [1.0, 0.7])
def test_threads_share_the_cache(room: float) -> None:
    module = make_module()
    packed, inputs = [PackedExpert(expert) for expert in make_experts(module)], torch.randn(6, 6)
    without, all_three = run(module, packed, inputs, None), WeightCache(MIB)
    run(module, packed, inputs, all_three)
    cache, found, start = WeightCache(int(room * all_three.num_bytes)), [], threading.Barrier(4)

    def work() -> None:
        start.wait()
        for _ in range(20):
            found.append(run(module, packed, inputs, cache))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(torch.equal(outputs, without) for outputs in found)
    assert 0 < cache.num_bytes <= cache.limit


def test_copies_and_pickles_are_empty_and_nothing_keeps_the_model_alive() -> None:
    module, cache = make_module(), WeightCache(MIB)
    packed = [PackedExpert(expert) for expert in make_experts(module)]
    run(module, packed, torch.randn(6, 6), cache)
    for other in (copy.deepcopy(cache), copy.copy(cache), pickle.loads(pickle.dumps(cache))):
        assert (other.limit, other.num_bytes) == (MIB, 0)
    there = weakref.ref(module)
    del module
    gc.collect()
    assert there() is None
    cache.clear()
    assert cache.num_bytes == 0
