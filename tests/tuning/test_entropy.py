"""AdaMerging's learning, against autograd through the sum of task vectors, written out."""

import itertools

import pytest
import torch
from torch.func import functional_call

from freemerge.tuning import entropy, entropy_gradient, learn_coefficients

TASKS = ("a", "b", "c")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def network():
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 5))


@pytest.fixture
def problem(network):
    """Base, task vectors, predictions and inputs of three tasks."""
    base = {name: normal(*value.shape, seed=index) for index, (name, value) in enumerate(network.named_parameters())}
    vectors = {
        task: {name: normal(*value.shape, seed=10 * row + index) for index, (name, value) in enumerate(base.items(), 5)}
        for row, task in enumerate(TASKS, 1)
    }
    heads = {task: normal(5, 3, seed=90 + row) for row, task in enumerate(TASKS)}

    def predict(task):
        return lambda weights, inputs: functional_call(network, dict(weights), inputs) @ heads[task]

    return base, vectors, {task: predict(task) for task in TASKS}


def test_the_gradient_is_that_of_autograd(problem):
    base, vectors, predict = problem
    inputs = {task: normal(7, 4, seed=50 + row) for row, task in enumerate(TASKS)}
    coefficients = torch.rand(3, len(base), generator=torch.Generator().manual_seed(1), requires_grad=True)
    merged = {
        name: start + sum(coefficients[row, column] * vectors[task][name] for row, task in enumerate(TASKS))
        for column, (name, start) in enumerate(base.items())
    }
    total = 0
    for task in TASKS:
        probabilities = predict[task](merged, inputs[task]).softmax(-1)
        total = total - (probabilities * probabilities.log()).sum(-1).mean()
    total.backward()
    value, gradient = entropy_gradient(coefficients.detach(), base, vectors, predict, inputs)
    assert value == pytest.approx(float(total), rel=1e-5)
    torch.testing.assert_close(gradient, coefficients.grad, rtol=1e-4, atol=1e-5)


def test_learning_is_adam_within_its_bounds(problem):
    base, vectors, predict = problem
    inputs = {task: normal(16, 4, seed=50 + row) for row, task in enumerate(TASKS)}
    learned = learn_coefficients(
        base, vectors, predict, {task: itertools.repeat(inputs[task]) for task in TASKS}, rate=0.05, steps=20
    )
    expected = torch.full((3, len(base)), 0.3, requires_grad=True)
    optimizer = torch.optim.Adam([expected], lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        merged = {
            name: start + sum(expected[row, column] * vectors[task][name] for row, task in enumerate(TASKS))
            for column, (name, start) in enumerate(base.items())
        }
        sum(entropy(predict[task](merged, inputs[task])).mean() for task in TASKS).backward()
        optimizer.step()
        with torch.no_grad():
            expected.clamp_(0, 1)
    found = torch.stack([torch.stack(list(learned[task].values())) for task in TASKS])
    torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-4)
    assert float(found.min()) == 0.0 or float(found.max()) == 1.0  # the bounds were met
    start, _ = entropy_gradient(torch.full_like(found, 0.3), base, vectors, predict, inputs)
    end, _ = entropy_gradient(found, base, vectors, predict, inputs)
    assert end < start


def test_entropy_of_known_distributions():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0], [0.0, 0.0, -100.0, -100.0]])
    torch.testing.assert_close(entropy(logits), torch.tensor([4.0, 1.0, 2.0]).log())


def test_a_model_that_diverges_is_an_error(problem):
    base, vectors, _ = problem
    broken = {task: (lambda weights, inputs: weights["0.weight"][:, :2] * torch.nan) for task in TASKS}
    with pytest.raises(ValueError, match="the entropy is nan in step 1"):
        learn_coefficients(base, vectors, broken, {task: itertools.repeat(normal(2, 4)) for task in TASKS})
