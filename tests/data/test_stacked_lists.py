"""Batches whose inputs hold more than tensors, read as samples."""

import pytest
import torch

from freemerge.data import StackedBatch
from freemerge.data.task_metrics import ExactMatch


def test_a_stacked_batch_with_texts_reads_as_samples() -> None:
    batch = StackedBatch((torch.arange(6.0).view(2, 3), ["a", "b"]), torch.tensor([0, 1]))
    (numbers, text), label = batch[1]
    assert numbers.tolist() == [3, 4, 5]
    assert (text, label.item()) == ("b", 1)


def test_exact_match_refuses_tokens_with_texts() -> None:
    with pytest.raises(ValueError, match="tokens with tokens or texts with texts"):
        ExactMatch().update(torch.zeros(1, 2, dtype=torch.long), ["a"])
