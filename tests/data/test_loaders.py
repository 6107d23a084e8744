"""Loaders of samples of different lengths: batches by length, each sample once, predictions in order."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.data import Subset

from freemerge.data import Task, TaskData, TaskMixture, TaskSuite, TokenDataset
from freemerge.data.loaders import LengthGroupedSampler, ShuffleSampler, evaluation_loader, lengths_of
from freemerge.data.mixture import JoinedDataset


def texts(count: int, seed: int = 0) -> TokenDataset:
    """Texts of 1 to 60 tokens; the tokens and the label of a text are its index."""
    lengths = torch.randint(1, 61, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    tokens = [[index] * length for index, length in enumerate(lengths)]
    masks = [[1] * length for length in lengths]
    return TokenDataset({"input_ids": tokens, "attention_mask": masks}, torch.arange(count))


@pytest.mark.parametrize("count", [1, 15, 16, 103])
def test_evaluation_visits_every_sample_once_with_little_padding(count):
    data = texts(count)
    batches = list(evaluation_loader(data, 8))
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == list(range(count))
    assert [len(labels) for _, labels in batches] == [8] * (count // 8) + [count % 8] * (count % 8 > 0)
    spent = sum(inputs["input_ids"].numel() for inputs, _ in batches)
    in_order = sum(inputs["input_ids"].numel() for inputs, _ in evaluation_loader(data, 8, in_order=True))
    needed = int(data.lengths.sum())
    assert spent <= in_order
    if count > 100:
        assert spent < 1.15 * needed < 1.6 * needed < in_order


def test_first_batches_are_no_shorter_than_others():
    lengths = torch.arange(1000)
    order = torch.tensor(list(LengthGroupedSampler(lengths, 10)))
    means = lengths[order].float().view(100, 10).mean(dim=1)
    assert 300 < means[:30].mean() < 700
    assert list(LengthGroupedSampler(lengths, 10)) == order.tolist()


def test_training_batches_have_similar_lengths_and_change_each_epoch():
    data = texts(1000)
    sampler = ShuffleSampler(1000, 3, data.lengths, 16)
    first, second = torch.tensor(list(sampler)), torch.tensor(list(sampler))
    assert sorted(first.tolist()) == list(range(1000))
    assert {tuple(sorted(batch.tolist())) for batch in first.split(16)}.isdisjoint(
        tuple(sorted(batch.tolist())) for batch in second.split(16)
    )
    sampler.set_epoch(0)
    assert list(sampler) == first.tolist()
    longest = data.lengths[first[:992]].view(62, 16).amax(dim=1)
    assert int(longest.sum()) * 16 < 1.1 * int(data.lengths[first[:992]].sum())  # about 1.9 times in a random order
    assert 25 < data.lengths[first[:160]].float().mean() < 36  # the first batches are representative
    assert len(ShuffleSampler(5, 0, texts(5).lengths, 16)) == len(list(ShuffleSampler(5, 0, texts(5).lengths, 16))) == 5


def test_a_task_groups_texts_by_length_and_a_mixture_does_not():
    task = Task("letters", tuple("ab"), texts(320), texts(20), texts(40))
    data = TaskData("letters", lambda: task, batch_size=10)
    mixture = TaskMixture(["one", "two"], partial(lambda task, name: task, task), batch_size=10)
    needed = int(task.train.lengths.sum())
    spent = {
        name: sum(inputs["input_ids"].numel() for inputs, _ in loader)
        for name, loader in {"task": data.train_dataloader(), "mixture": mixture.train_dataloader()}.items()
    }
    assert spent["task"] < 1.1 * needed < 1.5 * needed < spent["mixture"]


def test_lengths_of_subsets_and_joined_datasets():
    first, second = texts(20), texts(30, seed=1)
    joined = JoinedDataset([first, second])
    assert joined.lengths.tolist() == [*first.lengths.tolist(), *second.lengths.tolist()]
    assert lengths_of(Subset(joined, [45, 3])).tolist() == [int(second.lengths[25]), int(first.lengths[3])]
    images = torch.utils.data.TensorDataset(torch.zeros(4, 3), torch.zeros(4))
    assert lengths_of(images) is None
    assert JoinedDataset([first, images]).lengths is None


def test_predictions_keep_the_order():
    class Letters(TaskSuite):
        TASKS = ("letters",)

        def build(self, name):
            return task

    task = Task("letters", tuple("ab"), texts(50), texts(20), texts(40))
    data = TaskData("letters", lambda: task, eval_batch_size=8)
    mixture = TaskMixture(["one", "two"], partial(lambda task, name: task, task), eval_batch_size=8)
    assert torch.cat([labels for _, labels in data.predict_dataloader()]).tolist() == list(range(40))
    assert torch.cat([labels for _, labels in data.test_dataloader()]).tolist() != list(range(40))
    assert torch.cat([labels for _, labels in mixture.predict_dataloader()]).tolist() == [0] * 40 + [1] * 40
    suite = Letters(eval_batch_size=8)
    assert torch.cat([labels for _, labels in suite.predict_dataloader()["letters"]]).tolist() == list(range(40))
