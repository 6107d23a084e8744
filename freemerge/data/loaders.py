"""Data loaders whose order depends on (seed, epoch) alone.

Lightning tells a sampler the epoch through `set_epoch`, also through its wrapper for distributed runs. A run that is
stopped and resumed therefore gets the same batches as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from freemerge.data.batches import collate
from freemerge.data.resumable import EvaluationLoader, ResumableLoader


def derive_seed(seed: int, *keys: object) -> int:
    """Derive a seed from another seed and keys, so that every use of random numbers has a stream of its own.

    Args:
        seed: the user's seed.
        *keys: objects with a stable `str`, such as a task's name and a split.

    Returns:
        A seed in [0, 2^63), the same on every machine and Python version.
    """
    text = "/".join(str(key) for key in (seed, *keys))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class EpochSampler(Sampler[int]):
    """Base class of samplers whose order is drawn from (seed, epoch).

    Without `set_epoch` (in a plain torch loop), the epoch advances by one with each pass.

    Args:
        seed: seed of the order.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass; Lightning calls this.

        Args:
            epoch: the epoch, from 0.
        """
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        self.epoch += 1
        return iter(self._order(generator).tolist())

    def _order(self, generator: torch.Generator) -> Tensor:
        raise NotImplementedError


class ShuffleSampler(EpochSampler):
    """Every index of a dataset once per epoch, shuffled.

    Args:
        size: length of the dataset.
        seed: seed of the order.
        lengths: int64 (N,), the samples' lengths, if they differ. The shuffled samples are then sorted by length within
            each group of 32 batches, so that the samples of a batch have similar lengths.
        batch_size: samples per batch; used with `lengths` only.
    """

    def __init__(self, size: int, seed: int, lengths: Tensor | None = None, batch_size: int = 1) -> None:
        super().__init__(seed)
        self.size = size
        self.lengths = lengths
        self.batch_size = batch_size

    def __len__(self) -> int:
        return self.size

    def _order(self, generator: torch.Generator) -> Tensor:
        order = torch.randperm(self.size, generator=generator)
        if self.lengths is None:
            return order
        return _batches_by_length(order, self.lengths, self.batch_size, _BATCHES_PER_SORT * self.batch_size, generator)


class BalancedSampler(EpochSampler):
    """Equally many indices from each of several concatenated datasets, shuffled together.

    A dataset larger than `per_dataset` contributes a new random subset each epoch; a smaller one is repeated.

    Args:
        sizes: lengths of the datasets, in order.
        per_dataset: indices from each dataset per epoch.
        seed: seed of the order.

    Raises:
        ValueError: if a dataset is empty or `per_dataset` is below 1.
    """

    def __init__(self, sizes: Sequence[int], per_dataset: int, seed: int) -> None:
        super().__init__(seed)
        if per_dataset < 1 or min(sizes) < 1:
            raise ValueError(
                f"need at least one sample per dataset, got sizes {list(sizes)}, per_dataset {per_dataset}"
            )
        self.sizes = list(sizes)
        self.per_dataset = per_dataset

    def __len__(self) -> int:
        return len(self.sizes) * self.per_dataset

    def _order(self, generator: torch.Generator) -> Tensor:
        parts, offset = [], 0
        for size in self.sizes:
            rounds = -(-self.per_dataset // size)
            once = [torch.randperm(size, generator=generator) for _ in range(rounds)]
            parts.append(torch.cat(once)[: self.per_dataset] + offset)
            offset += size
        draws = torch.cat(parts)
        return draws[torch.randperm(len(draws), generator=generator)]


class LengthGroupedSampler(Sampler[int]):
    """Every index once; each batch has samples of similar lengths, which saves padding.

    The batches come in a random order, so that a run limited to the first few sees samples of all lengths. The order is
    the same in each pass.

    Args:
        lengths: int64 (N,), the samples' lengths.
        batch_size: samples per batch.
    """

    def __init__(self, lengths: Tensor, batch_size: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = self.lengths.argsort(descending=True, stable=True)  # the incomplete batch has the shortest samples
        generator = torch.Generator().manual_seed(0)
        return iter(_batches_by_length(order, self.lengths, self.batch_size, len(order), generator).tolist())


_BATCHES_PER_SORT = 32
"""Training samples are sorted by length within groups of this many batches. A larger group makes the lengths in a batch
more similar, and the composition of batches less random."""


def _batches_by_length(
    order: Tensor, lengths: Tensor, batch_size: int, group_size: int, generator: torch.Generator
) -> Tensor:
    """Group samples of similar lengths into batches, and shuffle the batches.

    Args:
        order: int64 (N,) indices; the last ones, which do not fill a batch, stay at the end.
        lengths: int64, the lengths of all samples.
        batch_size: samples per batch.
        group_size: how many consecutive samples of `order` are sorted by length together.
        generator: draws the order of the batches.

    Returns:
        int64 (N,), the indices in their new order.
    """
    whole = len(order) // batch_size * batch_size
    groups = [group[lengths[group].argsort(stable=True)] for group in order[:whole].split(group_size)]
    batches = torch.cat(groups).view(-1, batch_size)
    shuffled = batches[torch.randperm(len(batches), generator=generator)]
    return torch.cat([shuffled.flatten(), order[whole:]])


def training_loader(dataset: Dataset, sampler: EpochSampler, batch_size: int, num_workers: int = 0) -> DataLoader:
    """A loader for training.

    Args:
        dataset: map-style dataset.
        sampler: gives the order.
        batch_size: samples per batch. An incomplete last batch is dropped, unless it is the only one.
        num_workers: number of worker processes.

    Returns:
        The loader; an interrupted fit can resume in the middle of an epoch.
    """
    return ResumableLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=len(sampler) >= batch_size,  # type: ignore[arg-type]
        num_workers=num_workers,
        collate_fn=collate,
    )


def evaluation_loader(dataset: Dataset, batch_size: int, num_workers: int = 0, in_order: bool = False) -> DataLoader:
    """A loader for evaluation: every sample once.

    Args:
        dataset: map-style dataset. If its samples differ in length, its attribute `lengths` is int64 (N,).
        batch_size: samples per batch; the last one may be smaller.
        num_workers: number of worker processes.
        in_order: whether to keep the dataset's order even if samples differ in length, which takes more padding.

    Returns:
        The loader.
    """
    lengths = None if in_order else lengths_of(dataset)
    return EvaluationLoader(
        dataset,
        batch_size=batch_size,
        sampler=None if lengths is None else LengthGroupedSampler(lengths, batch_size),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # an evaluation must not advance the global generator, which training uses
        collate_fn=collate,
    )


def names_of(dataset: Dataset) -> Sequence[str] | None:
    """The names of a dataset's samples, such as their file names.

    Args:
        dataset: a dataset with an attribute `sample_names`, or a `Subset` of one.

    Returns:
        N names, or None if the dataset has no such attribute.
    """
    if isinstance(dataset, Subset):
        names = names_of(dataset.dataset)
        return None if names is None else [names[index] for index in dataset.indices]
    return getattr(dataset, "sample_names", None)


def lengths_of(dataset: Dataset) -> Tensor | None:
    """The lengths of a dataset's samples.

    Args:
        dataset: a dataset with an attribute `lengths`, or a `Subset` of one.

    Returns:
        int64 (N,), or None if the dataset has no such attribute: its samples are then equally long.
    """
    if isinstance(dataset, Subset):
        lengths = lengths_of(dataset.dataset)
        return None if lengths is None else lengths[torch.as_tensor(dataset.indices)]
    return getattr(dataset, "lengths", None)
