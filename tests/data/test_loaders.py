"""Samples of different lengths: evaluation sees each once, in batches that need little padding; prediction in order."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.data import Subset

from freemerge.data import Task, TaskData, TaskMixture, TokenDataset
from freemerge.data.loaders import SimilarLengths, evaluation_loader, lengths_of
from freemerge.data.mixture import JoinedDataset


def texts(count: int, seed: int = 0) -> TokenDataset:
    """Texts of 1 to 60 tokens; a text's tokens and its label are its index."""
    lengths = torch.randint(1, 61, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    tokens = [[index] * length for index, length in enumerate(lengths)]
    masks = [[1] * length for length in lengths]
    return TokenDataset({"input_ids": tokens, "attention_mask": masks}, torch.arange(count))


@pytest.mark.parametrize("count", [1, 15, 16, 103])
def test_every_sample_comes_once_and_batches_need_little_padding(count):
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
    order = torch.tensor(list(SimilarLengths(lengths, 10)))
    means = lengths[order].float().view(100, 10).mean(dim=1)
    assert 300 < means[:30].mean() < 700
    assert list(SimilarLengths(lengths, 10)) == order.tolist()


def test_lengths_of_parts_and_of_several_datasets():
    first, second = texts(20), texts(30, seed=1)
    joined = JoinedDataset([first, second])
    assert joined.lengths.tolist() == [*first.lengths.tolist(), *second.lengths.tolist()]
    assert lengths_of(Subset(joined, [45, 3])).tolist() == [int(second.lengths[25]), int(first.lengths[3])]
    images = torch.utils.data.TensorDataset(torch.zeros(4, 3), torch.zeros(4))
    assert lengths_of(images) is None
    assert JoinedDataset([first, images]).lengths is None


def test_predictions_keep_the_order():
    task = Task("letters", tuple("ab"), texts(50), texts(20), texts(40))
    data = TaskData("letters", lambda: task, eval_batch_size=8)
    mixture = TaskMixture(["one", "two"], partial(lambda task, name: task, task), eval_batch_size=8)
    assert torch.cat([labels for _, labels in data.predict_dataloader()]).tolist() == list(range(40))
    assert torch.cat([labels for _, labels in data.test_dataloader()]).tolist() != list(range(40))
    assert torch.cat([labels for _, labels in mixture.predict_dataloader()]).tolist() == [0] * 40 + [1] * 40
