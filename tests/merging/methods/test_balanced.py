"""Balanced merging against its equations in float64, written out."""

import numpy as np
import pytest
import torch

from freemerge.errors import MergeError
from freemerge.merging import BalancedMerging, WeightAverage, merge_task_vectors


def draw(shape, tasks, sizes=None):
    generator = np.random.default_rng(0)
    sizes = sizes or [1.0] * tasks
    return [size * generator.standard_normal(shape) for size in sizes]


def merged(deltas, method, name="w"):
    vectors = [{name: torch.from_numpy(delta).float()} for delta in deltas]
    return merge_task_vectors(vectors, method)[name].double().numpy()


def align(deltas):
    magnitudes = [np.abs(delta).mean() for delta in deltas]
    return [delta * max(magnitudes) / own for delta, own in zip(deltas, magnitudes, strict=True)]


def factors(delta, ridge):
    """The covariances of outputs (m, m) and inputs (n, n)."""
    rows, columns = delta.shape
    square = np.square(delta).sum()
    output = delta @ delta.T / square + ridge / rows * np.eye(rows)
    return output, delta.T @ delta / square + ridge / columns * np.eye(columns)


def solve(deltas, ridge):
    """The whole system, as one matrix: vec(G X A) = (G ⊗ A) vec(X) with rows one after the other, A symmetric."""
    system, right = 0, 0
    for delta in deltas:
        own = np.kron(*factors(delta, ridge))
        system, right = system + own, right + own @ delta.reshape(-1)
    return np.linalg.solve(system, right).reshape(deltas[0].shape)


def descend(deltas, ridge, steps):
    """Preconditioned conjugate gradients in their textbook form, on the same matrix."""
    kron = [np.kron(*factors(delta, ridge)) for delta in deltas]
    system = sum(kron)
    output, inputs = (sum(parts) for parts in zip(*(factors(delta, ridge) for delta in deltas), strict=True))
    precondition = np.kron(np.linalg.inv(output), np.linalg.inv(inputs))
    x = np.mean(deltas, axis=0).reshape(-1)
    residual = sum(own @ delta.reshape(-1) for own, delta in zip(kron, deltas, strict=True)) - system @ x
    z = precondition @ residual
    direction = z
    for _ in range(steps):
        step = residual @ z / (direction @ system @ direction)
        x = x + step * direction
        following = residual - step * system @ direction
        other = precondition @ following
        direction = other + (following @ other) / (residual @ z) * direction
        residual, z = following, other
    return x.reshape(deltas[0].shape)


@pytest.mark.parametrize("shape", [(12, 12), (7, 20), (20, 7), (1, 9), (9, 1)])
@pytest.mark.parametrize("tasks", [2, 4])
class TestEquations:
    def test_many_steps_solve_them(self, shape, tasks):
        deltas = draw(shape, tasks, [1.0, 30.0, 0.2, 5.0][:tasks])
        expected = solve(deltas, 0.3)
        result = merged(deltas, BalancedMerging(align=False, ridge=0.3, steps=300))
        np.testing.assert_allclose(result, expected, atol=1e-3 * np.abs(expected).max())

    @pytest.mark.parametrize("steps", [1, 3])
    def test_a_few_steps_are_conjugate_gradients(self, shape, tasks, steps):
        deltas = draw(shape, tasks, [1.0, 30.0, 0.2, 5.0][:tasks])
        expected = descend(align(deltas), 0.1, steps)
        result = merged(deltas, BalancedMerging(steps=steps))
        np.testing.assert_allclose(result, expected, atol=1e-3 * np.abs(expected).max())


def test_one_model_stays_as_it_is():
    (delta,) = draw((8, 11), 1)
    np.testing.assert_allclose(merged([delta], BalancedMerging(1.5)), 1.5 * delta, atol=1e-6)


LOW, HIGH = slice(0, 8), slice(8, 16)


@pytest.mark.parametrize("place", [(LOW, HIGH), (HIGH, LOW), (HIGH, HIGH)], ids=["rows", "columns", "nothing"])
def test_tasks_with_directions_of_their_own_come_back_whole(place):
    """Tasks that share only rows, only columns or nothing do not interfere; an average halves them."""
    first, second = np.zeros((16, 16)), np.zeros((16, 16))
    first[LOW, LOW], second[place] = np.linalg.qr(np.random.default_rng(0).standard_normal((2, 8, 8)))[0]
    result = merged([first, second], BalancedMerging(align=False, ridge=1e-3, steps=50))
    np.testing.assert_allclose(result, first + second, atol=0.01)


def test_unchanged_models_have_no_influence():
    deltas = draw((9, 14), 2)
    expected = merged(deltas, BalancedMerging())
    np.testing.assert_allclose(merged([*deltas, np.zeros((9, 14))], BalancedMerging()), expected, atol=1e-6)
    assert not merged([np.zeros((4, 6))] * 2, BalancedMerging()).any()


def test_embeddings_are_averaged():
    deltas = draw((30, 8), 2)
    name = "model.embed_tokens.weight"
    expected = merged(deltas, WeightAverage(), name)
    np.testing.assert_allclose(merged(deltas, BalancedMerging(2.0), name), 2 * expected, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BalancedMerging(ridge=0.0), "`ridge` must be positive, got 0.0"),
        (lambda: BalancedMerging(steps=0), "`steps` must be a positive integer, got 0"),
    ],
)
def test_parameters_are_checked(make, message):
    with pytest.raises(ValueError, match="BalancedMerging: " + message):
        make()


def test_equations_that_are_singular_in_float32_are_refused():
    deltas = [np.ones((40, 50)), 2 * np.ones((40, 50))]
    with pytest.raises(MergeError, match="the equations of the tensor 'w' are singular in float32 with `ridge` 1e-30"):
        merged(deltas, BalancedMerging(ridge=1e-30))
