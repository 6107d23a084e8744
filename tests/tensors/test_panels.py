"""Symmetric matrices in panels: factors and solutions as in float64, the memory of a triangle."""

import numpy as np
import pytest
import torch

from freemerge.tensors.covariances import add_both, add_covariances
from freemerge.tensors.panels import Panels, gram


def draw(*shape):
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape)).float()


SIZES = [1, 255, 256, 257, 700]  # panels have 256 columns


def panels_of(matrix, whole=None):
    panels = Panels(len(matrix), matrix.device, whole)
    panels.fill(lambda part, panel: panel.copy_(matrix[part.start :, part]))
    return panels


@pytest.mark.parametrize("size", SIZES)
def test_solutions_are_those_of_the_whole_matrix(size):
    samples = draw(size + 50, size) / (size + 50) ** 0.5
    matrix = samples.T @ samples
    panels = panels_of(matrix)
    torch.testing.assert_close(panels.full(), (matrix.tril() + matrix.tril(-1).T), atol=0, rtol=0)
    panels.add_to_diagonal_(0.5)
    exact = matrix.double() + 0.5 * torch.eye(size, dtype=torch.float64)
    right = draw(300, size)
    assert panels.factorize_()
    found = panels.divide_(right.clone())
    torch.testing.assert_close(found.double(), right.double() @ torch.linalg.inv(exact), atol=2e-5, rtol=0)
    transposed = panels.divide_(right.T.contiguous().T)  # columns of an array, as BalancedMerging has them
    torch.testing.assert_close(transposed, found, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_the_gram_matrix_is_exactly_symmetric(size):
    matrix = draw(size, 90)
    found = gram(matrix)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found.double(), matrix.double() @ matrix.double().T, atol=2e-4, rtol=0)
    torch.testing.assert_close(gram(matrix.T), matrix.T @ matrix, atol=2e-4, rtol=0)


def test_a_triangle_takes_half_of_the_memory():
    panels = Panels(4096, torch.device("cpu"))
    assert panels.panels[0].untyped_storage().nbytes() < 0.54 * 4 * 4096**2


@pytest.mark.parametrize("bad", [0, 300])
def test_a_singular_matrix_has_no_factor(bad):
    matrix = torch.eye(400)
    matrix[bad, bad] = -1.0
    assert not panels_of(matrix).factorize_()


@pytest.mark.parametrize("shape", [(3, 600, 600), (2, 300, 700), (2, 700, 300), (2, 500, 600)])
def test_sums_of_covariances(shape):
    """Shapes of every branch: wide, nearly square and tall, in several panels."""
    matrices, weights = draw(*shape), [0.5, 2.0, 0.0][: shape[0]]
    wide = matrices.double()
    covariance = sum(w * m.T @ m for m, w in zip(wide, weights, strict=True))
    products = sum(w * m @ m.T @ m for m, w in zip(wide, weights, strict=True))
    alone, both = (Panels(shape[2], matrices.device) for _ in range(2))
    add_covariances(matrices, weights, alone)
    np.testing.assert_allclose(add_both(matrices, weights, both), products, atol=3e-6 * float(products.abs().max()))
    for own in (alone, both):
        np.testing.assert_allclose(own.full(), covariance, atol=3e-6 * float(covariance.abs().max()))
