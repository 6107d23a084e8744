"""Streamed order statistics equal those of a full sort, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freemerge.merging import order_statistics
from freemerge.merging.methods.magnitudes import tensor_magnitudes
from freemerge.merging.task_vectors import Vectors
from freemerge.tensors.brackets import Bracket, _float, _key, _of_rank
from freemerge.tensors.chunks import Chunk


def assert_exact(values, ranks, cuts, sample=None):
    """values (K, n) float32 streamed in blocks that end at `cuts`; returns the number of passes."""
    passes = []

    def scan(see):
        passes.append(1)
        for block in torch.tensor_split(values, cuts, dim=1):
            see(block)

    found = order_statistics(scan, ranks, tuple(values.shape), sample)
    assert torch.equal(found, values.sort(dim=1).values[:, ranks])
    return len(passes)


def kinds(rows, total, generator):
    normal = torch.randn(rows, total, generator=generator)
    return {
        "normal": normal,
        "heavy tails": normal.pow(9),
        "heavier": normal.sign() * (normal.abs() * 20).exp(),
        "constant": torch.full((rows, total), -0.25),
        "zeros": torch.zeros(rows, total),
        "half zeros": normal.relu(),
        "signed zeros": normal.sign() * 0.0,
        "few values": (normal * 2).round(),
        "bfloat16": normal.to(torch.bfloat16).float(),
        "denormals": normal * 1e-40,
        "neighbours": (1.0 + normal * 1e-7),
        "sorted": normal.sort(dim=1).values,
        "infinite": normal.masked_fill(normal > 2, float("inf")).masked_fill(normal < -2, float("-inf")),
        "extremes": normal.sign() * torch.finfo(torch.float32).max,
    }


class Spy:
    """Count the calls of a method."""

    def __init__(self, method):
        self.calls = 0
        self.method = method

    def __get__(self, instance, owner):
        def call(*arguments):
            self.calls += 1
            return self.method(instance, *arguments)

        return call


@pytest.fixture
def small_batches(monkeypatch):
    """Make batches so small that a few thousand values form a long stream."""
    for name in ("_BATCH", "_PARTITIONED", "_PARTITIONED_DESPITE_SAMPLE"):
        monkeypatch.setattr(f"freemerge.tensors.order_statistics.{name}", 256)


@pytest.mark.parametrize("kind", kinds(1, 4, None))
def test_exact_for_every_kind_of_values(small_batches, kind):
    values = kinds(2, 1201, torch.Generator().manual_seed(0))[kind]
    ranks = [0, 1, 300, 600, 601, 1199, 1200, 600]
    cuts = [1, 2, 500, 500, 700]
    assert assert_exact(values, ranks, cuts) == 1  # few enough to collect
    assert assert_exact(values, ranks, cuts, values[:, ::3]) == 1
    # A misleading sample costs passes and nothing else.
    assert assert_exact(values, ranks, cuts, values[:, :1] + 5) <= 3
    assert assert_exact(values, ranks, cuts, torch.zeros(2, 1000)) <= 3


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("kind", kinds(1, 4, None))
def test_counting_is_as_exact_as_collecting(small_batches, kind, on_device, monkeypatch):
    if on_device:  # the code path for GPUs, which counts; it runs on every device
        monkeypatch.setattr("freemerge.tensors.brackets.Bracket.see", Bracket._see_on_device)
    values = kinds(2, 1201, torch.Generator().manual_seed(0))[kind]
    monkeypatch.setattr("freemerge.tensors.brackets._COLLECTED", 0)
    ranks, cuts = [0, 1, 300, 600, 1199, 1200], [1, 2, 500, 500, 700]
    assert assert_exact(values, ranks, cuts) == 2
    assert assert_exact(values, ranks, cuts, values[:, ::3]) <= 2
    assert assert_exact(values, ranks, cuts, values[:, :1] + 5) <= 4
    monkeypatch.setattr("freemerge.tensors.brackets._COUNTERS", 0)
    assert assert_exact(values, ranks, cuts, values[:, ::3]) <= 3


def test_the_zeros_of_frozen_weights_cost_no_pass(small_batches, monkeypatch):
    monkeypatch.setattr("freemerge.tensors.brackets._COLLECTED", 64)
    values = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0)).relu()
    assert assert_exact(values, [2, 5000], [], values[:, ::4]) == 1
    assert assert_exact(-values, [19_990, 15_000], [], -values[:, ::4]) == 1


def test_a_bracket_that_holds_more_than_expected_is_given_up(small_batches, monkeypatch):
    values = torch.randn(1, 1201, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("freemerge.tensors.brackets._COLLECTED", 200)
    monkeypatch.setattr("freemerge.tensors.brackets.Bracket.see", spy := Spy(Bracket.see))
    far = torch.linspace(9, 20, 5000)[None]
    sample = torch.cat([-far, values[:, :10], far], dim=1)  # as if the bracket were expected to hold almost no value
    assert assert_exact(values, [600], [], sample) == 3
    assert spy.calls == 3 * 5


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, 1e-42]), min_size=1, max_size=300
    ),
    data=st.data(),
)
def test_exact_for_any_floats(values, data):
    tensor = torch.from_numpy(np.array([values, values[::-1]], dtype=np.float32))
    index = st.integers(0, len(values) - 1)
    ranks = data.draw(st.lists(index, min_size=1, max_size=4))
    cuts = sorted(data.draw(st.lists(index, max_size=4)))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_BATCH", "_PARTITIONED", "_PARTITIONED_DESPITE_SAMPLE"):
            patch.setattr(f"freemerge.tensors.order_statistics.{name}", data.draw(st.sampled_from([7, 1 << 20])))
        patch.setattr("freemerge.tensors.brackets._COUNTERS", data.draw(st.sampled_from([1, 1 << 20])))
        patch.setattr("freemerge.tensors.brackets._COLLECTED", data.draw(st.sampled_from([1, 40, 1 << 20])))
        sample = tensor[:, : data.draw(index)] if data.draw(st.booleans()) else None
        assert_exact(tensor, ranks, cuts, sample)


@pytest.mark.parametrize("kind", kinds(1, 2, torch.Generator()))
def test_the_value_of_a_rank_among_collected_values(kind, monkeypatch):
    monkeypatch.setattr("freemerge.tensors.brackets._BLOCK", 100)
    values = kinds(1, 1001, torch.Generator().manual_seed(0))[kind][0].numpy()
    ordered = np.sort(values)
    assert all(_of_rank(values, rank) == ordered[rank] for rank in (0, 1, 250, 500, 998, 1000))


def test_values_that_fit_in_a_batch_take_one_pass():
    assert assert_exact(torch.randn(2, 1000), [3, 500], [10]) == 1


def test_a_large_stream(monkeypatch):
    values = torch.randn(2, 2_500_000, generator=torch.Generator().manual_seed(0))
    ranks = [0, 7, 250, 2_000_000, 2_499_999]
    assert assert_exact(values, ranks, [99]) == 1
    assert assert_exact(values, ranks, [99], values[:, ::100]) == 1
    monkeypatch.setattr("freemerge.tensors.brackets._COLLECTED", 1 << 16)
    assert assert_exact(values, ranks, [99]) == 2
    assert assert_exact(values, ranks, [99], values[:, ::10]) == 1


@pytest.mark.parametrize("cut", [True, False])
def test_order_statistics_within_each_tensor(cut):
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 0, 36, 5000, 70_000, 1_300_000)
    tensors = {str(size): torch.randn(2, size, generator=generator) for size in sizes}
    shapes = {name: values.shape[1:] for name, values in tensors.items()}

    def chunk(what: Chunk) -> torch.Tensor:
        return tensors[what.name][:, what.start : what.stop].clone()

    vectors = Vectors(["a", "b"], shapes, lambda name: tensors[name].clone(), chunk if cut else None)
    found = tensor_magnitudes(vectors, lambda size: [0, size // 3, size - 1])
    assert list(found) == [str(size) for size in sizes if size]
    for name, values in found.items():
        size = int(name)
        expected = tensors[name].abs().sort(dim=1).values[:, [0, size // 3, size - 1]]
        assert torch.equal(values, expected)


def test_keys_sort_like_the_values():
    values = np.array([-np.inf, -1.5, -1e-44, -0.0, 0.0, 1e-44, 1.0, 1e38, np.inf], dtype=np.float32)
    keys = _key(values)
    assert (np.diff(keys.astype(np.int64)) > 0).tolist() == [True, True, True, False, True, True, True, True]
    assert [_float(int(key)) for key in keys] == values.tolist()


def test_ranks_out_of_range(small_batches):
    for total in (10, 1000):
        for rank in (-1, total):
            with pytest.raises(ValueError, match=f"there is no value of rank {rank} among {total}"):
                order_statistics(lambda see, total=total: see(torch.zeros(1, total)), [rank], (1, total))
    with pytest.raises(ValueError, match="rank 0 among 0"):
        order_statistics(lambda see: None, [0], (1, 0))
