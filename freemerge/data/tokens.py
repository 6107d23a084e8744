"""Tokenized texts in memory: each text is tokenized once, and a batch is padded to its longest text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from freemerge.data.batches import StackedBatch
from freemerge.inputs import IGNORED, padding_of


class Ragged:
    """Integer sequences of different lengths, concatenated in one int32 tensor.


    Args:
        sequences: N sequences of integers that fit into int32.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        lengths = torch.tensor([0, *(len(sequence) for sequence in sequences)])
        self.ends = lengths.cumsum(0)  # (N + 1,)
        self.values = torch.tensor([value for sequence in sequences for value in sequence], dtype=torch.int32)

    def __len__(self) -> int:
        return len(self.ends) - 1

    @property
    def lengths(self) -> Tensor:
        """The lengths of the sequences, int64 (N,)."""
        return self.ends.diff()

    def __getitem__(self, index: int) -> Tensor:
        return self.values[self.ends[index] : self.ends[index + 1]].long()  # (L,)

    def padded(self, indices: Sequence[int], value: int) -> Tensor:
        """A batch of sequences, padded on the right.

        Args:
            indices: B indices.
            value: the padding value.

        Returns:
            int64 (B, L), L the length of the longest.
        """
        return pad_sequence([self[index] for index in indices], batch_first=True, padding_value=value)


class TokenDataset(Dataset):
    """A dataset of tokenized texts with labels.

    Args:
        inputs: the model's inputs by name (`input_ids`, `attention_mask`, …): N sequences each. A sample's sequences
            have the same length under all names except `labels`.
        labels: int64 or float32 (N,), or N sequences of tokens for language modelling.

    Raises:
        ValueError: if inputs and labels differ in number.
    """

    def __init__(self, inputs: Mapping[str, Sequence[Sequence[int]]], labels: Tensor | Sequence[Sequence[int]]) -> None:
        self.inputs = {name: Ragged(sequences) for name, sequences in inputs.items()}
        self.sample_names: Sequence[str] | None = None  # for prediction files; a source sets them if it knows them
        self.labels = labels if isinstance(labels, Tensor) else Ragged(labels)
        for name, sequences in self.inputs.items():
            if len(sequences) != len(self.labels):
                raise ValueError(f"there are {len(self.labels)} labels for {len(sequences)} texts in {name!r}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Tensor:
        """The samples' lengths in tokens, int64 (N,), by which loaders group samples into batches."""
        return torch.stack([sequences.lengths for sequences in self.inputs.values()]).amax(dim=0)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        return {name: sequences[index] for name, sequences in self.inputs.items()}, self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> StackedBatch[dict[str, Tensor]]:
        """Fetch a batch at once, padded on the right to its longest text."""
        inputs = {name: sequences.padded(indices, padding_of(name)) for name, sequences in self.inputs.items()}
        if isinstance(self.labels, Ragged):
            return StackedBatch(inputs, self.labels.padded(indices, IGNORED))
        return StackedBatch(inputs, self.labels[torch.as_tensor(indices)])
