"""Gram matrices and squared gradients against sums over the data and gradients written out."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from freemerge.checkpoints import save_checkpoint
from freemerge.merging import (
    GramMatrices,
    RegMean,
    SquaredGradients,
    draw_log_probability,
    measurable_layers,
    merge_task_vectors,
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_gram_matrices_of_linear_layers_are_of_all_inputs():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    batches = [normal(6, 7, 5, seed=1), normal(2, 7, 5, seed=2)]
    with GramMatrices(measurable_layers(model)) as grams, torch.no_grad():
        for batch in batches:
            model(batch)
    model(batches[0])  # outside the block nothing is collected
    first = torch.cat([batch.reshape(-1, 5) for batch in batches]).double()
    second = torch.tanh(first.float() @ model[0].weight.T + model[0].bias).double().detach()
    found = grams.tensors()
    assert list(found) == ["0.weight", "2.weight"]
    for name, inputs in (("0.weight", first), ("2.weight", second)):
        torch.testing.assert_close(found[name].double(), inputs.T @ inputs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"padding": 1, "stride": 2}, {"padding": "same"}, {"padding": "same", "dilation": 3}, {"padding": "valid"}],
    ids=str,
)
def test_patches_of_convolutions_are_what_the_weight_multiplies(options, monkeypatch):
    monkeypatch.setattr("freemerge.merging.measuring.gram_matrices._ROWS", 300)  # a few samples at a time
    kernel = (2, 3) if options.get("padding") == "same" else 3
    layer = nn.Conv2d(2, 4, kernel, bias=False, **options)
    images = normal(5, 2, 8, 7)
    with GramMatrices({"conv": layer}) as grams, torch.no_grad():
        outputs = layer(images)
    # Σ over outputs² is the trace of W G Wᵀ, whatever W is.
    gram, weight = grams.tensors()["conv.weight"].double(), layer.weight.detach().double().flatten(1)
    each = (weight @ gram @ weight.T).diagonal()
    torch.testing.assert_close(each, outputs.double().square().sum((0, 2, 3)), rtol=1e-5, atol=1e-6)
    assert gram.shape == (weight.shape[1],) * 2


def test_layers_that_cannot_be_measured_are_left_out():
    model = nn.ModuleDict(
        {
            "grouped": nn.Conv2d(4, 4, 3, groups=2),
            "reflected": nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
            "line": nn.Conv1d(2, 2, 3),
            "plain": nn.Conv2d(2, 2, 3),
            "norm": nn.LayerNorm(3),
        }
    )
    assert list(measurable_layers(model)) == ["plain"]


def test_regmean_of_convolutions_is_the_least_squares_solution(tmp_path):
    """argmin_W Σ_k ‖conv(X_k, W) − conv(X_k, W_k)‖², over all patches in float64."""
    weights = [normal(4, 2, 3, 3, seed=seed) for seed in range(2)]
    images = [normal(6, 2, 8, 8, seed=10 + seed) * (1 + seed) for seed in range(2)]
    paths = []
    for index, (weight, batch) in enumerate(zip(weights, images, strict=True)):
        layer = nn.Conv2d(2, 4, 3, padding=1)
        with GramMatrices({"conv": layer}) as grams, torch.no_grad():
            layer(batch)
        paths.append(str(tmp_path / f"{index}.safetensors"))
        save_checkpoint(paths[-1], grams.tensors())
        assert weight.shape == layer.weight.shape
    merged = merge_task_vectors([{"conv.weight": weight} for weight in weights], RegMean(paths, alpha=1.0))
    patches = [F.unfold(batch.double(), 3, padding=1).transpose(1, 2).flatten(0, 1) for batch in images]
    outputs = [rows @ weight.double().flatten(1).T for rows, weight in zip(patches, weights, strict=True)]
    expected = torch.linalg.lstsq(torch.cat(patches), torch.cat(outputs)).solution.T
    torch.testing.assert_close(merged["conv.weight"].flatten(1).double(), expected, atol=1e-4, rtol=1e-4)


def test_squared_gradients_of_a_linear_classifier():
    """For logits W x, ∂ log p(y|x) / ∂W = (1_y − p) xᵀ."""
    weight = normal(3, 4).requires_grad_()
    unused = normal(2).requires_grad_()
    inputs = normal(10, 4, seed=1)
    squares, generator = SquaredGradients({"w": weight, "unused": unused}), torch.Generator().manual_seed(5)
    for sample in inputs:
        squares.add(draw_log_probability((weight @ sample)[None], generator))
    again, expected = torch.Generator().manual_seed(5), torch.zeros(3, 4, dtype=torch.float64)
    for sample in inputs:
        probabilities = (weight @ sample).softmax(0).detach()
        label = int(torch.multinomial(probabilities[None], 1, generator=again))
        error = F.one_hot(torch.tensor(label), 3).double() - probabilities.double()
        expected += torch.outer(error, sample.double()).square() / len(inputs)
    found = squares.tensors()
    torch.testing.assert_close(found["w"].double(), expected, rtol=1e-4, atol=1e-7)
    assert torch.equal(found["unused"], torch.zeros(2))
    assert squares.samples == 10


def test_drawn_answers_follow_the_model():
    logits = torch.tensor([[0.0, 2.0, -1.0]])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_log_probability(logits, generator) for _ in range(4000)])
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum()
    assert float(-drawn.mean()) == pytest.approx(float(entropy), abs=0.03)  # E[−log p] under p


def test_ignored_tokens_do_not_contribute():
    outputs = normal(1, 4, 5).requires_grad_()
    counted = torch.tensor([[True, False, True, False]])
    (gradient,) = torch.autograd.grad(
        draw_log_probability(outputs, torch.Generator().manual_seed(0), "tokens", counted), outputs
    )
    assert torch.equal(gradient[0, 1], torch.zeros(5))
    assert gradient[0, [0, 2]].abs().sum() > 0


def test_a_regression_has_the_squared_gradient_of_its_output():
    """y ~ N(f, 1): E[((y − f) ∂f)²] = (∂f)²."""
    weight, sample = normal(4).requires_grad_(), normal(4, seed=1)
    squares, generator = SquaredGradients({"w": weight}), torch.Generator().manual_seed(0)
    for _ in range(4000):
        squares.add(draw_log_probability((weight @ sample).view(1, 1), generator, "normal"))
    torch.testing.assert_close(squares.tensors()["w"], sample.square(), rtol=0.1, atol=0.0)
