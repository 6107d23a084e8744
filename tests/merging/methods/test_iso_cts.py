"""Iso-CTS against the released code's steps in float64."""

import numpy as np
import pytest
import torch

from freemerge.merging import IsoC, IsoCTS, merge_task_vectors


def released(deltas, common=0.8):
    size, tasks = min(deltas[0].shape), len(deltas)
    shared = int(size * common)
    shared = size - round((size - shared) / tasks) * tasks
    own = (size - shared) // tasks
    u, s, vh = np.linalg.svd(sum(deltas), full_matrices=False)
    u, s, vh = u[:, :shared], s[:shared], vh[:shared]
    left, values, right = [], [], []
    for delta in deltas:
        ui, si, vi = np.linalg.svd(delta - u @ u.T @ delta, full_matrices=False)
        left.append(ui[:, :own])
        values.append(si[:own])
        right.append(vi[:own])
    factors = []
    for joined in (np.concatenate([*left, u], 1), np.concatenate([*right, vh], 0)):
        p, _, qh = np.linalg.svd(joined, full_matrices=False)
        factors.append(p @ qh)
    return np.concatenate([*values, s]).mean() * factors[0] @ factors[1]


@pytest.mark.parametrize("shape", [(24, 24), (40, 20), (20, 31)])
@pytest.mark.parametrize("tasks", [1, 2, 3])
@pytest.mark.parametrize("common", [0.8, 0.5, 1.0])
def test_is_the_released_code(shape, tasks, common):
    deltas = [np.random.default_rng(seed).standard_normal(shape) for seed in range(tasks)]
    vectors = [{"w": torch.from_numpy(delta).float()} for delta in deltas]
    merged = merge_task_vectors(vectors, IsoCTS(1.5, common=common))["w"]
    np.testing.assert_allclose(merged.numpy(), 1.5 * released(deltas, common), atol=2e-3)


def test_all_common_is_iso_c():
    vectors = [{"w": torch.randn(12, 17, generator=torch.Generator().manual_seed(seed))} for seed in range(3)]
    for name, merged in merge_task_vectors(vectors, IsoCTS(common=1.0)).items():
        torch.testing.assert_close(merged, merge_task_vectors(vectors, IsoC())[name], atol=1e-4, rtol=1e-4)


def test_silent_and_low_rank_tasks():
    assert not merge_task_vectors([{"w": torch.zeros(8, 8)}] * 2, IsoCTS())["w"].any()
    one = torch.outer(torch.arange(1.0, 9), torch.ones(8))
    merged = merge_task_vectors([{"w": one}, {"w": torch.zeros(8, 8)}], IsoCTS())["w"]
    torch.testing.assert_close(merged, one, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(40, 20), (20, 40), (24, 24)])
@pytest.mark.parametrize("least", [1e-2, 1e-4])
def test_with_singular_values_of_several_orders(shape, least):
    """Weak common directions are orthonormal, too; tasks share most of their directions."""
    values = np.geomspace(1, least, min(shape))

    def draw(seed):
        generator = np.random.default_rng(seed)
        left, right = (np.linalg.qr(generator.standard_normal((size, len(values))))[0] for size in shape)
        return left * values @ right.T

    deltas = [draw(9) + 0.3 * draw(seed) for seed in range(3)]
    vectors = [{"w": torch.from_numpy(delta).float()} for delta in deltas]
    expected = released([vector["w"].double().numpy() for vector in vectors])
    merged = merge_task_vectors(vectors, IsoCTS())["w"]
    np.testing.assert_allclose(merged.numpy(), expected, atol=5e-5 * np.abs(expected).max())
