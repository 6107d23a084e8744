"""Streamed order statistics equal those of a full sort, bit by bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freemerge.merging import order_statistics
from freemerge.merging.ranks import _keys, _values


def assert_exact(values, ranks, cuts):
    """values (K, n) float32 streamed in blocks that end at `cuts`."""
    passes = []

    def stream():
        passes.append(1)
        yield from torch.tensor_split(values, cuts, dim=1)

    found = order_statistics(stream, ranks)
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


@pytest.fixture
def small_batches(monkeypatch):
    """Batches so small that a few thousand values are a long stream."""
    monkeypatch.setattr("freemerge.merging.ranks._BATCH", 256)


@pytest.mark.parametrize("kind", kinds(1, 4, None))
def test_exact_for_every_kind_of_values(small_batches, kind):
    values = kinds(2, 1201, torch.Generator().manual_seed(0))[kind]
    ranks = [0, 1, 300, 600, 601, 1199, 1200, 600]
    assert assert_exact(values, ranks, [1, 2, 500, 500, 700]) <= 2


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
        patch.setattr("freemerge.merging.ranks._BATCH", data.draw(st.sampled_from([7, 1 << 20])))
        assert_exact(tensor, ranks, cuts)


def test_what_fits_in_a_batch_takes_one_pass():
    assert assert_exact(torch.randn(2, 1000), [3, 500], [10]) == 1


def test_a_large_stream():
    assert_exact(torch.randn(2, 2_500_000, generator=torch.Generator().manual_seed(0)), [0, 7, 2_000_000], [99])


def test_keys_sort_like_the_values():
    values = torch.tensor([float("-inf"), -1.5, -1e-44, -0.0, 0.0, 1e-44, 1.0, 1e38, float("inf")])
    keys = _keys(values)
    assert torch.equal(keys.sort().values, keys)
    assert torch.equal(_values(keys), values)


def test_ranks_that_no_value_has(small_batches):
    for total in (10, 1000):
        for rank in (-1, total):
            with pytest.raises(ValueError, match=f"there is no value of rank {rank} among {total}"):
                order_statistics(lambda total=total: [torch.zeros(1, total)], [rank])
    with pytest.raises(ValueError, match="rank 0 among 0"):
        order_statistics(lambda: [], [0])
