"""The distillation loss, against the formula written out."""

import pytest
import torch
from torch import nn

from freemerge.training import Distillation


def test_the_loss_equals_the_formula() -> None:
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


def test_a_student_equal_to_its_teacher_has_no_loss() -> None:
    features, head = torch.randn(6, 4), nn.Linear(4, 3)
    losses = Distillation()(features, features.clone(), head)
    assert losses["loss"].item() == pytest.approx(0.0, abs=1e-6)
    assert losses["agreement"] == 1.0


def test_cosine_ignores_lengths() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, head = torch.randn(6, 4, generator=generator), nn.Linear(4, 3)
    centre = teacher.mean(0)
    student = torch.randn(6, 4, generator=generator)
    a, b = student - centre, teacher - centre
    expected = (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()
    cosine = Distillation(feature_loss="cosine")
    torch.testing.assert_close(cosine(student, teacher, head)["features"], expected)
    assert cosine(centre + 3 * b, teacher, head)["features"].item() == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="feature_loss must be 'mse' or 'cosine', got 'l1'"):
        Distillation(feature_loss="l1")
