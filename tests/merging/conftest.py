"""Fixtures of the merging tests."""

import pytest

from tests.merging.merging_models import METHODS, finetune, make_base


@pytest.fixture(params=METHODS, ids=repr)
def method(request):
    """Every method, with parameters of every kind; those with lists are for three models."""
    return request.param


@pytest.fixture
def base():
    """Matrices, a convolution, a vector, a scalar, an integer and a boolean buffer."""
    return make_base()


@pytest.fixture
def models(base):
    """Three fine-tuned models of the base."""
    return [finetune(base, seed) for seed in range(3)]
