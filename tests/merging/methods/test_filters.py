"""The filters against the full complex transform; they are linear, real and high-pass."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freemerge.merging import Butterworth, Gaussian, HighPass, NyquistDisc

FILTERS = st.one_of(
    st.builds(NyquistDisc, st.floats(0.05, 1.5)),
    st.builds(HighPass, st.floats(0, 0.7)),
    st.builds(Butterworth, st.floats(0.01, 0.7), st.integers(1, 6)),
    st.builds(Gaussian, st.floats(0.01, 0.7)),
)
SIDES = st.tuples(st.integers(1, 24), st.integers(1, 24))
EVERY_FILTER = [NyquistDisc(), HighPass(0.2), Butterworth(0.2), Gaussian(0.2)]


def reference(filter_, matrix):
    """The definition: the real part of the inverse of the masked full transform, in float64."""
    height, width = matrix.shape
    rows = torch.arange(height, dtype=torch.float64)[:, None]
    columns = torch.arange(width, dtype=torch.float64)[None]
    gain = filter_.gain(rows, columns, height, width).expand(height, width).numpy()
    return np.fft.ifft2(np.fft.fft2(matrix.double().numpy()) * gain).real


@settings(max_examples=150, deadline=None)
@given(filter_=FILTERS, sides=SIDES, seed=st.integers(0, 999))
def test_half_a_spectrum_is_enough(filter_, sides, seed):
    matrix = torch.randn(sides, generator=torch.Generator().manual_seed(seed))
    np.testing.assert_allclose(filter_(matrix).numpy(), reference(filter_, matrix), atol=2e-6)


@settings(max_examples=50, deadline=None)
@given(filter_=FILTERS, sides=SIDES, seed=st.integers(0, 999), factor=st.floats(-3, 3))
def test_filters_are_linear(filter_, sides, seed, factor):
    first, second = torch.randn(2, *sides, generator=torch.Generator().manual_seed(seed))
    together = filter_(first + factor * second)
    torch.testing.assert_close(together, filter_(first) + factor * filter_(second), atol=2e-5, rtol=0)


@pytest.mark.parametrize("filter_", EVERY_FILTER, ids=repr)
def test_which_tensors_are_filtered(filter_):
    for shape in ((), (7,), (0, 3), (3, 0)):
        tensor = torch.randn(shape)
        filtered = filter_(tensor)
        assert torch.equal(filtered, tensor)
        assert tensor.numel() == 0 or filtered.data_ptr() != tensor.data_ptr()
    convolution = torch.randn(4, 3, 3, 3)
    assert torch.equal(filter_(convolution), filter_(convolution.reshape(4, 27)).reshape(4, 3, 3, 3))
    transposed = torch.randn(9, 5).T
    torch.testing.assert_close(filter_(transposed), filter_(transposed.contiguous()))


@pytest.mark.parametrize("filter_", EVERY_FILTER[1:], ids=repr)
def test_high_passes_remove_the_mean_and_keep_the_checkerboard(filter_):
    constant = torch.full((16, 12), 3.0)
    checkerboard = (torch.arange(16)[:, None] + torch.arange(12)[None]) % 2 * 2.0 - 1
    assert filter_(constant).abs().max() < 1e-5
    torch.testing.assert_close(filter_(checkerboard), checkerboard, atol=0.05, rtol=0)


def test_high_pass_is_an_orthogonal_projection():
    matrix = torch.randn(30, 21)
    once = HighPass(0.25)(matrix)
    torch.testing.assert_close(HighPass(0.25)(once), once, atol=2e-6, rtol=0)
    assert abs(float((once * (matrix - once)).sum())) < 1e-3


@pytest.mark.parametrize(("shape", "removed"), [((768, 768), 0.0002), ((2304, 768), 0.58), ((3072, 768), 0.68)])
def test_how_much_the_released_filter_removes(shape, removed):
    rows = torch.arange(shape[0], dtype=torch.float64)[:, None]
    columns = torch.arange(shape[1], dtype=torch.float64)[None]
    gain = NyquistDisc().gain(rows, columns, *shape)
    assert float((gain == 0).double().mean()) == pytest.approx(removed, rel=0.05)


def test_a_cutoff_of_zero_keeps_everything():
    matrix = torch.randn(8, 8)
    assert torch.equal(HighPass(0)(matrix), matrix)
    assert torch.equal(NyquistDisc(2)(matrix), matrix)


def test_wrong_parameters():
    for build in (lambda: Butterworth(0.0), lambda: Gaussian(-0.1), lambda: Butterworth(0.1, 0), lambda: HighPass("x")):
        with pytest.raises(ValueError, match=r"`(cutoff|order)` must"):
            build()


@pytest.mark.parametrize("shape", [(1, 80), (80, 1), (1, 5, 16), (1, 1), (1, 1, 16), (2, 80)])
@pytest.mark.parametrize("filter_", [NyquistDisc(), NyquistDisc(0.3), HighPass(0.2), Gaussian(0.1)], ids=repr)
def test_a_matrix_of_one_row_is_filtered_as_any_other(filter_, shape):
    """For example position embeddings and class tokens of ViTs; compared with plain complex transforms."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrix = tensor.flatten(1).double()
    height, width = matrix.shape
    rows, columns = torch.arange(height).double()[:, None], torch.arange(width).double()[None, :]
    gain = filter_.gain(rows, columns, height, width)
    expected = torch.fft.ifft2(torch.fft.fft2(matrix) * gain).real.reshape(shape)
    torch.testing.assert_close(filter_(tensor).double(), expected, rtol=1e-5, atol=1e-5)
