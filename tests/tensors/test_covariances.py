"""Sums of covariances, and division by them, against float64."""

import numpy as np
import pytest
import torch

from freemerge.tensors.covariances import divide, pseudo_inverse, sum_both, sum_covariances


def draw(*shape):
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape)).float()


@pytest.mark.parametrize("shape", [(3, 20, 20), (2, 40, 12), (2, 12, 40), (2, 30, 1100), (2, 1100, 30)])
def test_sums(shape):
    matrices, weights = draw(*shape), [0.5, 2.0, 0.0][: shape[0]]
    wide = matrices.double()
    covariance = sum(w * m.T @ m for m, w in zip(wide, weights, strict=True))
    products = sum(w * m @ m.T @ m for m, w in zip(wide, weights, strict=True))
    found = sum_both(matrices, weights)
    np.testing.assert_allclose(found[0], products, atol=3e-6 * float(products.abs().max()))
    for own in (found[1], sum_covariances(matrices, weights)):
        np.testing.assert_allclose(own, covariance, atol=3e-6 * float(covariance.abs().max()))


@pytest.mark.parametrize("room", [False, True])
def test_divide(room):
    samples, expected = draw(50, 12), draw(7, 12)
    covariance = samples.T @ samples
    workspace = torch.empty(2, 7, 12) if room else None
    found = divide(expected @ covariance, covariance.clone(), workspace)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    if room:  # the factor is where it was told to be
        factor = workspace.view(-1)[:144].view(12, 12).T.tril()
        torch.testing.assert_close(factor @ factor.T, covariance, atol=1e-3, rtol=1e-4)


def test_division_by_singular_covariances():
    samples = torch.zeros(20, 6)
    samples[:, :4] = draw(20, 4)
    covariance = samples.T @ samples
    expected = draw(3, 6)
    expected[:, 4:] = 0
    found = divide(expected @ covariance, covariance, torch.empty(36))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    inverse = pseudo_inverse(covariance)
    torch.testing.assert_close(inverse, torch.linalg.pinv(covariance.double()), atol=1e-5, rtol=1e-4)
    assert not pseudo_inverse(torch.zeros(3, 3)).any()
