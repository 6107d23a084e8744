"""ACE-Merging against its equations in float64, written out."""

import numpy as np
import pytest
import torch

from freemerge.merging import ACEMerging, merge_task_vectors


def draw(shape, tasks, sizes=None):
    generator = np.random.default_rng(0)
    sizes = sizes or [1.0] * tasks
    return [size * generator.standard_normal(shape) + 0.1 * size for size in sizes]


def merged(deltas, method):
    return (
        merge_task_vectors([{"w": torch.from_numpy(delta).float()} for delta in deltas], method)["w"].double().numpy()
    )


def normalized(deltas, ridge=0.1):
    above, below = 0, 0
    for delta in deltas:
        centered = delta - delta.mean(0)
        covariance = centered.T @ centered / np.trace(centered.T @ centered)
        covariance = covariance + ridge * np.diag(covariance).mean() * np.eye(len(covariance))
        above, below = above + delta @ covariance, below + covariance
    return above @ np.linalg.inv(below)


def released(deltas, ridge=1e-2):
    """The steps of the authors' code, in their order, in float64."""
    tasks, columns = len(deltas), deltas[0].shape[1]
    logarithms = np.log([np.trace(delta.T @ delta) for delta in deltas])
    differ = tasks > 1 and logarithms.var(ddof=1) / logarithms.mean() ** 2 > 0.3
    raw, products, sums = [], 0, 0
    for delta in deltas:
        centered = delta - delta.mean(0, keepdims=True)
        covariance = centered.T @ centered
        unit = np.trace(covariance) if differ else 1.0
        covariance = covariance / unit
        raw.append(covariance)
        covariance = covariance + ridge / unit * np.eye(columns)
        products, sums = products + centered @ covariance, sums + covariance
    shared = sum(raw).mean(0, keepdims=True)
    if differ:
        shared = shared / np.mean([np.trace(delta.T @ delta) for delta in deltas])
    result = products @ np.linalg.inv(sums + shared)
    if not differ:
        return result
    rest = sum(delta @ (own - sums / tasks) for delta, own in zip(deltas, raw, strict=True))
    u, s, vh = np.linalg.svd(rest + result, full_matrices=False)
    kept = int(len(s) * 0.3)
    return result + s[:kept].mean() * u[:, :kept] @ vh[:kept]


@pytest.mark.parametrize("shape", [(24, 24), (40, 12), (13, 31), (300, 40), (40, 300)])
@pytest.mark.parametrize("tasks", [1, 2, 4])
class TestEquations:
    def test_normalized(self, shape, tasks):
        deltas = draw(shape, tasks, [1.0, 30.0, 0.2, 5.0][:tasks])
        expected = normalized(deltas)
        np.testing.assert_allclose(merged(deltas, ACEMerging()), expected, atol=2e-4 * np.abs(expected).max())

    def test_released(self, shape, tasks):
        deltas = draw(shape, tasks)
        expected = released(deltas)
        np.testing.assert_allclose(
            merged(deltas, ACEMerging(form="released", ridge=0.5)),
            released(deltas, 0.5),
            atol=5e-4 * np.abs(expected).max(),
        )


@pytest.mark.parametrize("shape", [(24, 24), (40, 12), (13, 31)])
def test_released_with_norms_far_apart(shape):
    deltas = draw(shape, 3, [1.0, 0.03, 0.01])
    ratio = np.log([np.square(delta).sum() for delta in deltas])
    assert ratio.var(ddof=1) / ratio.mean() ** 2 > 0.3  # so that the second half of the code runs
    expected = released(deltas, 0.5)
    result = merged(deltas, ACEMerging(form="released", ridge=0.5))
    np.testing.assert_allclose(result, expected, atol=1e-3 * np.abs(expected).max())


def test_tasks_with_inputs_of_their_own_keep_their_outputs():
    """Inputs in two orthogonal halves: each task's part is recovered completely, where an average halves it."""
    first, second = np.zeros((16, 16)), np.zeros((16, 16))
    generator = np.random.default_rng(0)
    first[:, :8], second[:, 8:] = generator.standard_normal((2, 16, 8))
    result = merged([first, second], ACEMerging(ridge=1e-4))
    np.testing.assert_allclose(result, first + second, atol=0.02)


def test_unchanged_models_have_no_influence():
    deltas = draw((9, 14), 2)
    expected = merged(deltas, ACEMerging())
    np.testing.assert_allclose(merged([*deltas, np.zeros((9, 14))], ACEMerging()), expected, atol=1e-6)
    for form in ("normalized", "released"):
        assert not merged([np.zeros((4, 6))] * 2, ACEMerging(form=form)).any()


def test_without_a_ridge_directions_of_no_task_are_left_out():
    deltas = [np.zeros((6, 8)) for _ in range(2)]
    deltas[0][:, :3], deltas[1][:, 2:5] = np.random.default_rng(0).standard_normal((2, 6, 3))
    result = merged(deltas, ACEMerging(ridge=0.0))
    assert np.abs(result[:, 5:]).max() < 1e-5
    assert np.isfinite(result).all()
