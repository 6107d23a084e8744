"""`FreeModel.generate`: each prompt gets the tokens that its task's own model generates for it alone."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freemerge.experts import mix, write_into
from freemerge.models import FreeModel, LanguageBackbone, Router
from tests.language_models import expert_of, language_model
from tests.tiny import tiny_backbone

PROMPTS = [[10, 5, 6, 7], [11, 8], [12, 9, 5], [10, 7, 8, 9, 6, 5], [11, 5, 9]]
TASKS = ("a", "b", "plain")  # the last one has no expert
OWN = [0, 1, 2, 0, 1]  # the first token names the task
KINDS = ("llama", "gpt2", "mamba", "t5", "bart")


class FirstToken(Router):
    """Routes by the first token of a prompt, 10, 11 or 12; any other is uncertain."""

    KIND = "first_token"

    def __init__(self) -> None:
        super().__init__(3, 3, hidden=0, directions=0)
        self.head.weight.data = 20 * torch.eye(3)
        self.head.bias.data.zero_()

    def features(self, inputs: Any, backbone: Any = None) -> Tensor:
        first = backbone.router_inputs(inputs)["input_ids"][:, 0]
        return (first[:, None] == torch.tensor([10, 11, 12])).float()


def model_of(kind: str, experts: str = "low_rank", **settings: Any) -> FreeModel:
    backbone = language_model(kind)
    kinds = ("low_rank", "sparse") if experts == "both" else (experts, experts)
    own = {task: expert_of(backbone, seed, kind) for seed, (task, kind) in enumerate(zip("ab", kinds, strict=True))}
    return FreeModel(backbone, {task: nn.Identity() for task in TASKS}, own, FirstToken(), **settings).eval()


def padded(prompts: list[list[int]], left: bool) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    rows = [([0] * (width - len(p)) + p) if left else (p + [0] * (width - len(p))) for p in prompts]
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def alone(model: FreeModel, task: str | None, prompt: list[int], **arguments: Any) -> list[list[int]]:
    """What transformers itself generates for one prompt with a task's weights; None is the merged backbone."""
    backbone = model.backbone if task is None else model.task_model(task).backbone
    assert isinstance(backbone, LanguageBackbone)
    ids = torch.tensor([prompt])
    tokens = backbone.model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **arguments)
    first = len(prompt) if backbone.kind == "causal_lm" else 1
    return tokens[:, first:].tolist()


def stripped(row: list[int]) -> list[int]:
    """An answer up to its end, token 2, or without what pads it."""
    row = row[: row.index(2) + 1] if 2 in row else row
    while row and row[-1] == 0:
        row = row[:-1]
    return row


def same(found: Tensor, expected: list[list[int]]) -> None:
    assert [stripped(row) for row in found.tolist()] == [stripped(row) for row in expected]


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("experts", ["low_rank", "sparse", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_prompt_of_a_mixed_batch_gets_what_it_gets_alone(kind: str, experts: str, left: bool) -> None:
    model = model_of(kind, experts)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    answers = model.generate(**padded(PROMPTS, left), max_new_tokens=8, do_sample=False)
    expected = [
        alone(model, TASKS[own], prompt, max_new_tokens=8, do_sample=False)[0]
        for own, prompt in zip(OWN, PROMPTS, strict=True)
    ]
    same(answers.tokens, expected)
    assert answers.task_names == [TASKS[own] for own in OWN]
    assert not answers.abstained.any()
    merged = [alone(model, None, prompt, max_new_tokens=8, do_sample=False)[0] for prompt in PROMPTS]
    assert any(merged[row] != expected[row] for row in (0, 3))  # the experts make a difference
    assert any(merged[row] != expected[row] for row in (1, 4))
    same(model.task_model("b").generate(padded(PROMPTS[1:2], left), max_new_tokens=8, do_sample=False), expected[1:2])
    told = model.generate(padded(PROMPTS, left), task="b", max_new_tokens=8, do_sample=False)
    same(told.tokens, [alone(model, "b", prompt, max_new_tokens=8, do_sample=False)[0] for prompt in PROMPTS])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 3, "max_new_tokens": 6},
        {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 6, "length_penalty": 0.5},
        {"repetition_penalty": 1.5, "max_new_tokens": 8},
        {"no_repeat_ngram_size": 1, "max_new_tokens": 8},
        {"max_length": 9},
        {"min_length": 8, "max_new_tokens": 9},
        {"use_cache": False, "max_new_tokens": 4},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
@pytest.mark.parametrize("experts", ["low_rank", "sparse"])
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_arguments_of_transformers_mean_the_same_as_alone(kind: str, experts: str, arguments: dict) -> None:
    model = model_of(kind, experts)
    answers = model.generate(padded(PROMPTS, True), do_sample=False, **arguments)
    expected = [
        row
        for own, prompt in zip(OWN, PROMPTS, strict=True)
        for row in alone(model, TASKS[own], prompt, do_sample=False, **arguments)
    ]
    same(answers.tokens, expected)


def test_several_experts_are_mixed() -> None:
    model = model_of("llama", top_n=2)
    model.router.head.weight.data = torch.tensor([[20.0, 19.0, 0.0], [20.0, 20.0, 0.0], [0.0, 0.0, 20.0]])
    answers = model.generate(padded(PROMPTS[:2], True), max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        logits, _ = model.route(padded(PROMPTS[:2], True))
    for row, prompt in enumerate(PROMPTS[:2]):
        share = (logits[row].softmax(0)[0] * 16).round() / 16
        mixed = language_model("llama")
        write_into(mixed.weights(), mix([model.experts["a"], model.experts["b"]], [float(share), 1 - float(share)]))
        expected = mixed.generate({"input_ids": torch.tensor([prompt])}, max_new_tokens=8, do_sample=False)
        same(answers.tokens[row : row + 1], expected.tolist())


def test_prompts_that_the_router_abstains_from_get_the_merged_backbone() -> None:
    model = model_of("llama", threshold=0.9)
    prompts = [PROMPTS[0], [20, 5, 6]]
    answers = model.generate(padded(prompts, True), max_new_tokens=8, do_sample=False)
    assert answers.abstained.tolist() == [False, True]
    same(answers.tokens[1:], alone(model, None, prompts[1], max_new_tokens=8, do_sample=False))


def test_answers_in_the_data_are_not_read() -> None:
    model = model_of("llama")
    ids = torch.tensor([[*PROMPTS[0], 30, 31, 2], [*PROMPTS[1], 33, 2, 0, 0, 0]])
    shown = torch.tensor([[1] * 4 + [0] * 3, [1] * 2 + [0] * 5])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "prompt_mask": shown}
    answers = model.generate(inputs, max_new_tokens=8, do_sample=False)
    same(
        answers.tokens, [alone(model, TASKS[own], PROMPTS[own], max_new_tokens=8, do_sample=False)[0] for own in (0, 1)]
    )


def test_padding_is_known_without_a_mask() -> None:
    model = model_of("gpt2")
    inputs = padded(PROMPTS, True)
    expected = model.generate(inputs, max_new_tokens=6, do_sample=False)
    answers = model.generate(inputs["input_ids"], max_new_tokens=6, do_sample=False)
    assert answers.tokens.equal(expected.tokens)
    assert answers.task.equal(expected.task)


def test_lengths_are_those_before_the_end() -> None:
    backbone = language_model("llama")
    tokens = torch.tensor([[5, 2, 0], [2, 0, 0], [5, 6, 7], [5, 0, 0]])
    assert backbone.ends_of(tokens, {}).tolist() == [1, 0, 3, 1]
    assert backbone.ends_of(tokens, {"eos_token_id": [6, 7]}).tolist() == [2, 1, 1, 1]


@pytest.mark.parametrize("experts", ["low_rank", "sparse"])
def test_threads_generate_at_the_same_time(experts: str) -> None:
    model = model_of("gpt2", experts)
    inputs = padded(PROMPTS, True)
    expected = model.generate(inputs, max_new_tokens=6, do_sample=False).tokens
    wrong: list[object] = []

    def work(rows: list[int]) -> None:
        for _ in range(3):
            part = {name: tensor[rows] for name, tensor in inputs.items()}
            try:
                found = model.generate(part, max_new_tokens=6, do_sample=False).tokens
                same(found, expected[rows].tolist())
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(rows,)) for rows in ([0, 1], [2, 3, 4], [1, 4], [3])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_prompts_have_no_answers() -> None:
    answers = model_of("llama").generate(torch.zeros(0, 4, dtype=torch.long))
    assert answers.tokens.shape == (0, 0)
    assert answers.token_lists() == answers.task_names == []


def test_refusals() -> None:
    model = model_of("llama")
    with pytest.raises(ValueError, match="generate needs prompts: texts, or input_ids"):
        model.generate(max_new_tokens=3)
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        model.generate(torch.randn(2, 3))
    with pytest.raises(ValueError, match="no tokenizer for texts"):
        model.generate("good")
    with pytest.raises(ValueError, match="unknown task 'c'"):
        model.generate(torch.tensor([PROMPTS[0]]), task="c")
    with pytest.raises(ValueError, match="returns tokens only"):
        model.generate(torch.tensor([PROMPTS[0]]), return_dict_in_generate=True)
    images = FreeModel(tiny_backbone(), {"a": nn.Linear(16, 3)})
    with pytest.raises(ValueError, match="generates no text, only a LanguageBackbone does"):
        images.generate(torch.tensor([PROMPTS[0]]))
