"""Batches that are tensors or dicts of tensors."""

from typing import NamedTuple

import pytest
import torch

from freemerge.data import StackedBatch, TokenDataset, collate
from freemerge.inputs import batch_size, device_of, join, select, to_device

TOKENS = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}


def test_tensors_and_dicts_behave_alike() -> None:
    images = torch.randn(2, 1, 4, 4)
    for inputs in (images, TOKENS):
        assert batch_size(inputs) == 2
        assert device_of(inputs) == torch.device("cpu")
        assert batch_size(select(inputs, slice(0, 1))) == 1
        assert batch_size(to_device(inputs, "cpu")) == 2
    assert torch.equal(select(TOKENS, torch.tensor([1]))["input_ids"], torch.tensor([[8, 9, 0]]))
    assert torch.equal(select(images, torch.tensor([True, False])), images[:1])


def test_join_pads_tokens_on_the_right() -> None:
    short = {"input_ids": torch.tensor([[4]]), "attention_mask": torch.tensor([[1]])}
    joined = join([short, TOKENS])
    assert joined["input_ids"].tolist() == [[4, 0, 0], [5, 6, 7], [8, 9, 0]]
    assert joined["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]
    labelled = join([{"labels": torch.tensor([[3]])}, {"labels": torch.tensor([[1, 2]])}])
    assert labelled["labels"].tolist() == [[3, -100], [1, 2]]


def test_join_refuses_incompatible_batches() -> None:
    with pytest.raises(
        ValueError, match=r"cannot concatenate batches of different structure: .*1, 4, 4.* and .*3, 4, 4"
    ):
        join([torch.zeros(1, 1, 4, 4), torch.zeros(1, 3, 4, 4)])
    with pytest.raises(ValueError, match="attention_mask"):
        join([TOKENS, torch.zeros(1, 2)])


def test_a_token_dataset_pads_each_batch_to_its_own_longest() -> None:
    data = TokenDataset({"input_ids": [[1, 2, 3], [4], [5, 6]], "labels": [[7], [8, 9], [1]]}, [[7], [8, 9], [1]])
    batch = data.__getitems__([1, 2])
    assert batch.inputs["input_ids"].tolist() == [[4, 0], [5, 6]]
    assert batch.inputs["labels"].tolist() == batch.labels.tolist() == [[8, 9], [1, -100]]
    assert batch.labels.dtype == torch.int64
    by_sample = collate([data[1], data[2]])  # as a Subset of another library returns it
    assert by_sample[0]["input_ids"].tolist() == [[4, 0], [5, 6]]
    assert by_sample[1].tolist() == batch.labels.tolist()
    with pytest.raises(ValueError, match="2 labels for 3 texts in 'input_ids'"):
        TokenDataset({"input_ids": [[1], [2], [3]]}, torch.tensor([0, 1]))


def test_a_stacked_batch_reads_as_samples() -> None:
    batch = StackedBatch(TOKENS, torch.tensor([0, 1]))
    inputs, label = list(batch)[1]
    assert inputs["input_ids"].tolist() == [8, 9, 0]
    assert label == 1


def test_nested_inputs_are_handled_part_by_part() -> None:
    nested = {"image": torch.arange(3.0)[:, None], "text": {"ids": torch.tensor([[1, 2], [3, 4], [5, 6]])}}
    inputs = (nested, ["a", "b", "c"], [("x", 1)], None)
    assert batch_size(inputs) == 3
    assert device_of(inputs) == torch.device("cpu")
    for index in (torch.tensor([2, 0]), torch.tensor([True, False, True]), slice(1, 3)):
        (found, texts, meta, none), kept = select(inputs, index), torch.arange(3)[index].tolist()
        assert found["image"].flatten().tolist() == kept
        assert found["text"]["ids"][:, 0].tolist() == [2 * k + 1 for k in kept]
        assert texts == ["abc"[k] for k in kept]
        assert (meta, none) == ([("x", 1)], None)
    assert to_device(inputs, "meta")[0]["text"]["ids"].device.type == "meta"


def test_nested_inputs_are_joined_part_by_part() -> None:
    batches = [{"image": torch.zeros(1, 2), "text": {"ids": torch.ones(1, n, dtype=torch.long)}} for n in (1, 3)]
    joined = join(batches)
    assert joined["image"].shape == (2, 2)
    assert joined["text"]["ids"].tolist() == [[1, 0, 0], [1, 1, 1]]
    pairs = join([(torch.zeros(1), torch.ones(1, 1)), (torch.ones(2), torch.ones(2, 2))])
    assert pairs[0].tolist() == [0, 1, 1]
    assert pairs[1].tolist() == [[1, 0], [1, 1], [1, 1]]


class _Pair(NamedTuple):
    image: torch.Tensor
    text: torch.Tensor


def test_named_tuples_keep_their_type() -> None:
    joined = join([_Pair(torch.zeros(1), torch.ones(1, 1)), _Pair(torch.ones(2), torch.ones(2, 2))])
    assert type(joined) is _Pair
    assert joined.image.tolist() == [0, 1, 1]
    assert joined.text.tolist() == [[1, 0], [1, 1], [1, 1]]
    assert select(joined, slice(1, 2)).image.tolist() == [1]
