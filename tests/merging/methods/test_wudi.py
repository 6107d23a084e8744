"""WUDI-Merging against the released loop and against the condition of the minimum."""

import numpy as np
import pytest
import torch

from freemerge.merging import WUDIMerging, merge_task_vectors


def draw(shape, tasks, size=0.01):
    return [size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in range(tasks)]


def released(deltas, steps, learning_rate):
    """The loss as the paper writes it, torch's own Adam and autograd, float64."""
    vectors = torch.stack(deltas).double()
    merged = torch.nn.Parameter(vectors.sum(0))
    optimizer = torch.optim.Adam([merged], lr=learning_rate)
    norms = vectors.flatten(1).norm(dim=1).square()[:, None, None]
    for _ in range(steps):
        optimizer.zero_grad()
        (((merged - vectors) @ vectors.mT).square() / norms).sum().backward()
        optimizer.step()
    return merged.detach()


@pytest.mark.parametrize("shape", [(16, 16), (30, 12), (9, 25)])
@pytest.mark.parametrize("tasks", [1, 3])
def test_adam_is_the_released_loop(shape, tasks):
    deltas = draw(shape, tasks)
    merged = merge_task_vectors([{"w": delta} for delta in deltas], WUDIMerging())["w"]
    expected = released(deltas, 300, 1e-5)
    assert tasks == 1 or float((expected - torch.stack(deltas).double().sum(0)).abs().max()) > 1e-3
    np.testing.assert_allclose(merged.numpy(), expected.numpy(), atol=2e-5)


@pytest.mark.parametrize("shape", [(16, 16), (30, 12), (9, 60)])
def test_exact_is_the_minimum(shape):
    deltas = draw(shape, 3)
    merged = merge_task_vectors([{"w": delta} for delta in deltas], WUDIMerging(solver="exact"))["w"].double()
    vectors = torch.stack(deltas).double()
    norms = vectors.flatten(1).norm(dim=1).square()[:, None, None]

    def loss(point):
        return (((point - vectors) @ vectors.mT).square() / norms).sum()

    gradient = torch.func.grad(loss)
    assert float(gradient(merged).norm()) < 1e-3 * float(gradient(vectors.sum(0)).norm())
    assert loss(merged) < loss(released(deltas, 300, 1e-5)) < loss(vectors.sum(0))


def test_one_task_comes_back_and_silence_stays():
    (delta,) = draw((8, 20), 1)
    merged = merge_task_vectors([{"w": delta}, {"w": torch.zeros(8, 20)}], WUDIMerging(solver="exact"))["w"]
    torch.testing.assert_close(merged, delta, atol=1e-6, rtol=1e-4)
    for solver in ("adam", "exact"):
        assert not merge_task_vectors([{"w": torch.zeros(4, 4)}] * 2, WUDIMerging(solver=solver))["w"].any()
