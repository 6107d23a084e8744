"""Stacked batches, read as samples."""

import torch

from freemerge.data import StackedBatch


def test_a_stacked_batch_with_texts_reads_as_samples() -> None:
    batch = StackedBatch((torch.arange(6.0).view(2, 3), ["a", "b"]), torch.tensor([0, 1]))
    (numbers, text), label = batch[1]
    assert numbers.tolist() == [3, 4, 5]
    assert (text, label.item()) == ("b", 1)
