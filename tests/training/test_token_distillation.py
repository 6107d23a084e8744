"""Experts of language models: the loss at the tokens of the answers, written out."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from freemerge.experts import write_into
from freemerge.training import ExpertTrainer
from freemerge.training import distillation as distillation_module
from freemerge.training.distillation import Distillation
from freemerge.training.teacher import Teacher
from tests.language_models import expert_of, language_model, residual

IDS = torch.tensor([[5, 6, 7, 8, 9, 2], [10, 11, 12, 2, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
LABELS = torch.tensor([[-100, -100, -100, 8, 9, 2], [-100, -100, 12, 2, -100, -100]])


def test_chunks_of_tokens_have_the_loss_and_gradients_of_the_whole(monkeypatch) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(7, 4, requires_grad=True), torch.randn(7, 4)
    own, other = torch.randn(9, 4, requires_grad=True), torch.randn(9, 4)
    distillation = Distillation(feature_weight=0.5, logit_weight=2.0, temperature=3.0)
    sizes = []

    def head(part: torch.Tensor) -> torch.Tensor:
        sizes.append(len(part))
        return part @ own.T

    monkeypatch.setattr(distillation_module, "_LOGITS", 3 * 9)
    found = distillation.of_tokens(student, teacher, (head, lambda part: part @ other.T))
    assert sizes == [3, 3, 1]
    log_student, log_teacher = (F.log_softmax(x / 3, dim=1) for x in (student @ own.T, teacher @ other.T))
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=1).mean()
    features = (student - teacher).square().mean() / (teacher - teacher.mean(dim=0)).square().mean()
    torch.testing.assert_close(found["loss"], 0.5 * features + 2.0 * 9 * divergence)
    agreement = (log_student.argmax(1) == log_teacher.argmax(1)).float().mean()
    torch.testing.assert_close(found["agreement"], agreement)
    expected = torch.autograd.grad(0.5 * features + 2.0 * 9 * divergence, (student, own))
    torch.testing.assert_close(torch.autograd.grad(found["loss"], (student, own)), expected)


def test_a_batch_without_answers_has_no_loss() -> None:
    states = torch.zeros(0, 4, requires_grad=True)
    losses = Distillation().of_tokens(states, states.detach(), (nn.Identity(), nn.Identity()))
    losses["loss"].backward()
    assert all(value.item() == 0 for value in losses.values())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])  # GPT-2's and T5's embeddings are tied
def test_the_loss_is_that_of_the_answers_tokens(kind: str) -> None:
    backbone, tuned = language_model(kind), language_model(kind)
    difference = residual(backbone, 5, 0.1)
    tuned.load_weights({name: tensor + difference.get(name, 0) for name, tensor in tuned.weights().items()})
    expert = expert_of(backbone, 1)
    student = copy.deepcopy(backbone)
    write_into(student.weights(), expert)
    labels = LABELS if backbone.kind == "causal_lm" else IDS.masked_fill(MASK == 0, -100)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    if backbone.kind == "seq2seq":
        inputs["labels"] = labels
    teacher = {name: tensor.clone() for name, tensor in tuned.weights().items()}
    trainer = ExpertTrainer(copy.deepcopy(backbone), nn.Identity(), teacher, expert, feature_weight=0.0, temperature=1)
    losses = trainer._losses(inputs, labels)
    with torch.no_grad():
        one, other = F.log_softmax(student(inputs), dim=-1), F.log_softmax(tuned(inputs), dim=-1)
    # causal: the answers' tokens are 3 to 5 and 2 to 3, which the logits one position earlier predict
    at = ([0, 0, 0, 1, 1], [2, 3, 4, 1, 2]) if backbone.kind == "causal_lm" else (MASK == 1).nonzero(as_tuple=True)
    expected = (other[at].exp() * (other[at] - one[at])).sum(dim=1).mean()
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-4, atol=1e-6)
    same = (one[at].argmax(1) == other[at].argmax(1)).float().mean()
    torch.testing.assert_close(losses["agreement"], same)
    losses["loss"].backward()
    # the gradient by `functional_call` on all changed weights at once
    values = trainer.values.detach().clone().requires_grad_()
    changed, weights = expert.with_values(values), backbone.weights()
    added = {f"model.{name}": changed.added(name, weights[name]) for name in expert.shapes}
    logits = F.log_softmax(torch.func.functional_call(backbone, added, (inputs,)), dim=-1)[at]
    (other[at].exp() * (other[at] - logits)).sum(dim=1).mean().backward()
    torch.testing.assert_close(trainer.values.grad, values.grad, rtol=1e-3, atol=1e-5)


def test_the_states_of_texts_of_any_length_are_cached() -> None:
    backbone, tuned = language_model("gpt2"), language_model("gpt2", 1)
    teacher = Teacher(tuned.weights(), cache=True)
    positions = backbone.answer_positions(LABELS)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    with tuned.states_only(positions) as expected, torch.no_grad():
        tuned(inputs)
    torch.testing.assert_close(teacher(backbone, inputs, positions), expected[0])
    passes: list[int] = []
    backbone.register_forward_hook(lambda *_: passes.append(1))
    resumed = Teacher(tuned.weights(), cache=True)
    resumed.load_cached(teacher.cached(), torch.device("cpu"))
    second = {name: tensor[1:, :4] for name, tensor in inputs.items()}  # without its padding
    for one in (teacher, resumed):
        torch.testing.assert_close(one(backbone, second, positions[1:, :4]), expected[0][3:])
    assert not passes
