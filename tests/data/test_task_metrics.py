"""Metrics by name, on one rank and on two, against scikit-learn and SciPy on the whole data."""

import math

import pytest
import torch
import torch.distributed as dist
from scipy import stats
from sklearn import metrics as sk
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from freemerge.data import Task
from freemerge.evaluation import ExactMatch, LabelSpace, MultiTaskMetrics, TaskMetric, evaluate, metric_for
from freemerge.models import FreeOutput
from tests import processes

SIZES = (5, 7)  # not divisible by two ranks; with batches of four, the second rank gets a batch of 1 or 3
BATCH = 4
VOCABULARY = 11


def make(task, size):
    """One task's outputs and labels, (N, …) each."""
    generator = torch.Generator().manual_seed(size)
    if task in ("pearson", "spearman"):
        labels = torch.randn(size, generator=generator)
        return (labels + torch.randn(size, generator=generator))[:, None], labels
    if task in ("perplexity", "exact_match"):
        labels = torch.randint(VOCABULARY, (size, 3), generator=generator)
        logits = torch.randn(size, 3, VOCABULARY, generator=generator)
        logits.scatter_add_(2, labels[..., None], torch.full((size, 3, 1), 2.5))
        labels[0, 2] = -100
        return logits, labels
    labels = torch.randint(3, (size,), generator=generator)
    return torch.randn(size, 3, generator=generator) + torch.eye(3)[labels], labels


def expected(task, output, labels):
    if task == "pearson":
        return stats.pearsonr(output[:, 0], labels).statistic
    if task == "spearman":
        return stats.spearmanr(output[:, 0], labels).statistic
    if task == "perplexity":
        return math.exp(cross_entropy(output.double().flatten(0, 1), labels.flatten(), ignore_index=-100))
    if task == "exact_match":
        pairs = zip(output.argmax(2).tolist(), labels.tolist(), strict=True)
        right = [all(a == b for a, b in zip(*pair, strict=True) if b >= 0) for pair in pairs]
        return sum(right) / len(right)
    if task == "recall@2":
        return sk.top_k_accuracy_score(labels, output, k=2, labels=range(3))
    predicted = output.argmax(1)
    return {
        "accuracy": sk.accuracy_score,
        "f1_macro": lambda true, found: sk.f1_score(true, found, average="macro"),
        "matthews": sk.matthews_corrcoef,
    }[task](labels, predicted)


SPECS = {
    f"{name}-{size}": ("seq2seq:" if name in ("perplexity", "exact_match") else "") + name
    for name in ("accuracy", "f1_macro", "matthews", "recall@2", "pearson", "spearman", "exact_match", "perplexity")
    for size in SIZES
}


def measured():
    data = {task: make(task.rpartition("-")[0], int(task[-1])) for task in SPECS}
    loaders = {task: list(zip(*(part.split(BATCH) for part in pair), strict=True)) for task, pair in data.items()}
    space = LabelSpace(dict.fromkeys(SPECS, 3))
    return evaluate(lambda inputs, task: inputs, loaders, space, metrics=SPECS)


def rank(index, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=index, world_size=2)
    torch.save(measured(), f"{folder}/{index}.pt")
    dist.destroy_process_group()


def check(found):
    assert list(found) == list(SPECS)
    for task, value in found.items():
        name = task.rpartition("-")[0]
        assert value == pytest.approx(expected(name, *make(name, int(task[-1]))), abs=1e-6), task
    assert any(0 < value < 1 for value in found.values())


def test_every_metric_equals_the_reference_library():
    check(measured())


def test_two_ranks_give_the_same_numbers(tmp_path):
    context = processes.forkserver()
    ranks = [context.Process(target=rank, args=(index, tmp_path)) for index in range(2)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(120)
    assert [each.exitcode for each in ranks] == [0, 0]
    found = [torch.load(tmp_path / f"{index}.pt") for index in range(2)]
    assert found[0] == found[1]
    check(found[0])


def test_metric_names_are_parsed():
    task = Task("price", (), *[TensorDataset(torch.zeros(2, 1), torch.zeros(2))] * 3, kind="regression")
    assert TaskMetric.of(task) == TaskMetric("regression", "pearson")
    assert TaskMetric.parse("accuracy") == TaskMetric()
    assert TaskMetric.parse("recall@10") == TaskMetric("classification", "recall@10")
    assert TaskMetric.parse("pearson") == TaskMetric("regression", "pearson")
    assert TaskMetric.parse("perplexity") == TaskMetric("causal_lm", "perplexity")
    assert TaskMetric.parse("exact_match") == TaskMetric("seq2seq", "exact_match")
    assert TaskMetric.parse("seq2seq:perplexity") == TaskMetric("seq2seq", "perplexity")
    assert [TaskMetric.parse(name).label for name in ("accuracy", "f1_macro")] == ["acc", "f1_macro"]
    assert not TaskMetric.parse("perplexity").higher_is_better
    with pytest.raises(ValueError, match="there is no metric 'f1'; choose one of accuracy"):
        TaskMetric.parse("f1")
    with pytest.raises(ValueError, match="'pearson' does not suit classification"):
        TaskMetric.parse("classification:pearson")
    with pytest.raises(ValueError, match="accuracy needs the number of classes"):
        metric_for("accuracy")


def test_a_causal_model_is_evaluated_on_the_next_token():
    labels = torch.tensor([[1, 2, 3, 4]])
    logits = torch.full((1, 4, 5), -20.0)
    logits[0, [0, 1, 2], [2, 3, 4]] = 20.0  # the logits at the last position predict a token that does not exist
    metrics = MultiTaskMetrics(
        LabelSpace({"lm": 0, "whole": 0}), {"lm": "perplexity", "whole": "causal_lm:exact_match"}
    )
    for task in ("lm", "whole"):
        metrics.update(task, logits, labels)
    assert metrics.compute() == {"lm": pytest.approx(1.0), "whole": 1.0}


def test_exact_match_ignores_spaces_at_the_ends_of_texts():
    metric = ExactMatch()
    metric.update(["Paris", " Rome\n", "rome"], ["Paris", "Rome", "Rome"])
    assert float(metric.compute()) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=r"tokens of one shape, got \[1, 2\] and \[1, 3\]"):
        metric.update(torch.zeros(1, 2), torch.zeros(1, 3))


def test_recall_of_samples_routed_to_another_task():
    inf = float("-inf")
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [3.0, 1.0, inf]])
    output = FreeOutput(torch.tensor([0, 1, 1]), logits, None, ("a", "b"))
    labels = torch.tensor([1, 1, 0])  # class 1 is second best in sample 0; samples 1 and 2 were routed to b
    for k, recall in (("1", 0.0), ("2", 1 / 3), ("3", 1.0)):
        metrics = MultiTaskMetrics(LabelSpace({"a": 3, "b": 2}), {"a": f"recall@{k}"})
        metrics.update("a", output, labels)
        assert metrics.compute(["a"]) == {"a": pytest.approx(recall)}


def test_a_torchmetrics_metric_receives_the_models_output():
    metrics = MultiTaskMetrics(LabelSpace({"a": 2}), {"a": MulticlassAccuracy(2, average="macro")})
    metrics.update("a", torch.tensor([[1.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1]))
    assert metrics.compute() == {"a": 0.5}
    with pytest.raises(ValueError, match="a metric for 'b', which is not among the tasks: a"):
        MultiTaskMetrics(LabelSpace({"a": 2}), {"b": "accuracy"})


@pytest.mark.parametrize(
    ("metric", "shape", "message"),
    [
        ("pearson", (4, 2), "one number per sample"),
        ("perplexity", (4, 2), r"logits \(B, L, V\)"),
    ],
)
def test_an_unsuitable_output_is_refused(metric, shape, message):
    metrics = MultiTaskMetrics(LabelSpace({"a": 0}), {"a": metric})
    with pytest.raises(ValueError, match=message):
        metrics.update("a", torch.zeros(shape), torch.zeros(4))


def test_exact_match_refuses_tokens_with_texts():
    with pytest.raises(ValueError, match="tokens with tokens or texts with texts"):
        ExactMatch().update(torch.zeros(1, 2, dtype=torch.long), ["a"])
