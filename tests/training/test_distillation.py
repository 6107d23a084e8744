"""The distillation loss against sums by hand, and the gradients' root mean square against plain backward passes."""

import copy

import pytest
import torch
from torch import nn

from freemerge.training import Distillation, gradient_rms
from tests.tiny import TinySuite, tiny_backbone


def test_the_loss_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(5, 4, generator=generator), torch.randn(5, 4, generator=generator)
    head = nn.Linear(4, 3)
    losses = Distillation(feature_weight=0.5, logit_weight=2.0, temperature=3.0)(student, teacher, head)
    features = ((student - teacher) ** 2).sum() / ((teacher - teacher.mean(0)) ** 2).sum()
    p, q = (head(teacher) / 3).softmax(1), (head(student) / 3).softmax(1)
    logits = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(losses["features"], features)
    torch.testing.assert_close(losses["logits"], logits.detach())
    torch.testing.assert_close(losses["loss"], 0.5 * features + 2 * logits)
    assert losses["agreement"] == (p.argmax(1) == q.argmax(1)).float().mean()


def test_a_student_like_its_teacher_loses_nothing() -> None:
    features, head = torch.randn(6, 4), nn.Linear(4, 3)
    losses = Distillation()(features, features.clone(), head)
    assert losses["loss"].item() == pytest.approx(0.0, abs=1e-6)
    assert losses["agreement"] == 1.0


def test_gradient_rms_is_that_of_plain_backward_passes_and_goes_round_the_data() -> None:
    backbone, head, loss = tiny_backbone().eval(), nn.Linear(16, 4), Distillation()
    teacher = {name: tensor + 0.05 for name, tensor in backbone.weights().items()}
    before = {name: tensor.clone() for name, tensor in backbone.weights().items()}
    batches = list(TinySuite(eval_batch_size=16).val_dataloader()["corners"])[:2]
    got = gradient_rms(backbone, head, teacher, batches, loss, count=3)
    mean, other = copy.deepcopy(backbone), copy.deepcopy(backbone).eval()
    other.load_weights(teacher)
    squares = {name: torch.zeros_like(p) for name, p in mean.model.named_parameters()}
    for inputs, _ in [*batches, batches[0]]:
        mean.zero_grad()
        loss(mean(inputs), other(inputs).detach(), head)["loss"].backward()
        for name, parameter in mean.model.named_parameters():
            squares[name] += parameter.grad.square()
    assert got.keys() == backbone.weights().keys()
    for name, square in squares.items():
        torch.testing.assert_close(got[name], (square / 3).sqrt())
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.weights().items())
    with pytest.raises(ValueError, match="there are no batches"):
        gradient_rms(backbone, head, teacher, [], loss, count=1)
