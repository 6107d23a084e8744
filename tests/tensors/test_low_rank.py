"""Truncated singular value decompositions against the exact one, for spectra of every kind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freemerge.tensors.low_rank import factorize, squared_error


def spectrum(rows, columns, values):
    generator = torch.Generator().manual_seed(rows)
    left, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator))
    right, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator))
    return (left * values) @ right.T


INDEX = torch.arange(1.0, 301)
SPECTRA = {
    "flat": torch.ones(300),
    "slow": INDEX**-0.5,
    "harmonic": 1 / INDEX,
    "fast": torch.exp(-INDEX / 10),
    "steps": torch.cat([torch.full((10,), 10.0), torch.ones(290)]),
    "low rank": (INDEX <= 12).float(),
    "rank one": (INDEX <= 1).float(),
}


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_the_error_is_that_of_the_best_approximation(kind, rank):
    matrix = spectrum(420, 300, SPECTRA[kind])
    left, right = factorize(matrix, rank)
    assert left.shape == (420, rank)
    assert right.shape == (rank, 300)
    best = float(SPECTRA[kind][rank:].square().sum().sqrt())
    error = squared_error(matrix, left, right) ** 0.5
    assert best - 1e-4 <= error <= best * 1.005 + 3e-6 * float(matrix.norm())
    again = factorize(matrix, rank)
    assert torch.equal(left, again.left)
    assert torch.equal(right, again.right)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), rank=st.integers(1, 14), seed=st.integers(0, 99))
def test_small_matrices_are_exact(rows, columns, rank, seed):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    left, right = factorize(matrix, rank)
    assert left.shape == (rows, min(rank, rows, columns))
    values = torch.linalg.svdvals(matrix.double())
    assert abs(squared_error(matrix, left, right) - float(values[rank:].square().sum())) < 1e-5


def test_zeros_have_zero_factors():
    for shape in ((3, 4), (400, 500)):
        left, right = factorize(torch.zeros(shape), 2)
        assert not (left @ right).any()
