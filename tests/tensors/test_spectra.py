"""Singular values from the Gram matrix agree with a float64 decomposition up to float32 rounding."""

import numpy as np
import pytest
import torch

from freemerge.tensors.spectra import (
    exact_products,
    extend_to_isometry_,
    leading_components,
    left_spectrum,
    rounding,
    to_nearest_isometry_,
)


def spectral(rows: int, columns: int, values: list[float]) -> torch.Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(max(rows, columns), max(rows, columns), dtype=torch.float64, generator=generator)
    u, _, vh = torch.linalg.svd(draw[:rows, :columns], full_matrices=False)
    return ((u[:, : len(values)] * torch.tensor(values, dtype=torch.float64)) @ vh[: len(values)]).float()


@pytest.mark.parametrize("columns", [12, 700])
def test_values_over_five_orders_of_magnitude_are_those_of_a_decomposition(columns):
    matrix = spectral(12, columns, [10.0 ** (-index / 2) for index in range(11)])
    directions, values = left_spectrum(matrix, tolerance=1e-6)
    u, s, _ = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    assert len(values) == 11
    np.testing.assert_allclose(values.numpy(), s[:11], rtol=1e-6)
    np.testing.assert_allclose(np.abs(u[:, :11].T @ directions.numpy()), np.eye(11), atol=1e-6)


def test_singular_values_below_the_tolerance_are_left_out():
    matrix = spectral(9, 30, [1.0, 0.5, 1e-3])
    assert len(left_spectrum(matrix, rounding(9, 30))[1]) == 3
    assert len(left_spectrum(matrix, 0.01)[1]) == 2
    directions, values = left_spectrum(torch.zeros(4, 6), 0.0)
    assert directions.shape == (4, 0)
    assert values.shape == (0,)


@pytest.mark.parametrize("shape", [(8, 8), (6, 300), (300, 6)])
def test_the_nearest_isometry_is_the_polar_factor(shape):
    matrix = spectral(*shape, [3.0, 2.0, 1.0, 0.5])
    u, s, vh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    values = to_nearest_isometry_(matrix, rounding(*shape))
    np.testing.assert_allclose(matrix.numpy(), u[:, :4] @ vh[:4], atol=1e-5)
    np.testing.assert_allclose(values.numpy(), s[:4], rtol=1e-5)
    matrix.zero_()
    assert len(to_nearest_isometry_(matrix, 0.0)) == 0
    assert not matrix.any()


@pytest.mark.parametrize("least", [0.5, 0.1, 0.02])
@pytest.mark.parametrize("columns", [40, 300])
def test_leading_components_are_those_of_a_decomposition(least, columns):
    """For matrices whose Gram matrix determines them in float32, and for one where it does not."""
    matrix = spectral(40, columns, np.geomspace(1.0, least, 10).tolist() + [least / 4] * 30)
    u, s, vh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    side, values, rows = leading_components(matrix, 10, rounding(40, columns))
    np.testing.assert_allclose(values.numpy(), s[:10], rtol=2e-5)
    np.testing.assert_allclose((side * values) @ rows, (u[:, :10] * s[:10]) @ vh[:10], atol=2e-5)
    for factor in (side.T, rows):
        np.testing.assert_allclose(factor @ factor.T, np.eye(10), atol=2e-5)


def test_fewer_leading_components_than_requested():
    matrix = spectral(9, 30, [1.0, 0.5])
    side, values, rows = leading_components(matrix, 4, rounding(9, 30))
    assert (side.shape, values.shape, rows.shape) == ((9, 2), (2,), (2, 30))
    assert leading_components(matrix, 0, 0.0)[1].shape == (0,)
    assert leading_components(torch.zeros(4, 6), 2, 0.0)[2].shape == (0, 6)


@pytest.mark.parametrize(("count", "fixed"), [(3, 20), (8, 5), (4, 0), (0, 6), (6, 24)])
@pytest.mark.parametrize("apart", [True, False])
def test_rows_beside_orthonormal_ones_become_the_nearest_isometry(count, fixed, apart):
    """Whether the rows have directions of their own or nearly lie in the span of the orthonormal ones."""
    draw = torch.randn(30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    others = torch.linalg.qr(draw).Q[:fixed]
    own = torch.randn(count, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if not apart and fixed > count:
        own = own @ others.T @ others + 0.03 * own
    rows = torch.cat([own, others])
    u, _, vh = torch.linalg.svd(rows, full_matrices=False)
    found = rows.float()
    extend_to_isometry_(found, own @ rows.T, rounding(*rows.shape))
    torch.testing.assert_close(found.double(), u @ vh, atol=3e-5, rtol=0)


def test_rows_that_are_only_rounding_beside_orthonormal_ones_are_left_out():
    rows = torch.eye(4)[:, :3].contiguous()
    rows[0] = rows[1]  # no direction of its own: both share one, as in the nearest isometry of a singular matrix
    expected = torch.zeros(3, 3)
    expected[:2, 1], expected[2, 2] = 0.5**0.5, 1.0
    rows = rows[:3]
    extend_to_isometry_(rows, rows[:1].double() @ rows.double().T, rounding(3, 3))
    torch.testing.assert_close(rows, expected, atol=1e-6, rtol=0)


def test_exact_products():
    left, right = spectral(5, 700, [1.0, 1e-4]), spectral(7, 700, [1e-3])
    torch.testing.assert_close(exact_products(left, right), left.double() @ right.double().T, atol=1e-18, rtol=1e-12)
