"""Data loaders whose order is a function of (seed, epoch) alone.

Lightning tells a sampler the epoch through `set_epoch`, in one process and, through its distributed wrapper, in many. A
run that is stopped and resumed therefore sees the batches that it would have seen without the stop.
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
    """Mixes a seed with a path of keys, so that every use of randomness has a stream of its own.

    Args:
        seed: The user's seed.
        *keys: Anything with a stable `str`, such as a task's name and a split.

    Returns:
        A seed in [0, 2^63), equal on every machine and Python version.
    """
    text = "/".join(str(key) for key in (seed, *keys))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class EpochSampler(Sampler[int]):
    """Indices in an order drawn from (seed, epoch).

    Without `set_epoch` (a plain torch loop) the epoch advances by itself with each pass.

    Args:
        seed: Seed of the order.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next pass; Lightning calls this."""
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
        size: Length of the dataset.
        seed: Seed of the order.
        lengths: Of the samples, (N,), if they differ: the samples of a batch are then of similar lengths, as far as
            that goes among those of a few dozen batches that chance has brought together.
        batch_size: Samples per batch, where there are lengths.
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
        return _in_similar_batches(order, self.lengths, self.batch_size, _AMONG * self.batch_size, generator)


class BalancedSampler(EpochSampler):
    """Equally many indices from each of several datasets laid end to end, shuffled together.

    A dataset larger than its share gives a fresh random part each epoch; a smaller one is gone through again.

    Args:
        sizes: Lengths of the datasets, in order.
        per_dataset: How many indices of each per epoch.
        seed: Seed of the order.
    """

    def __init__(self, sizes: Sequence[int], per_dataset: int, seed: int) -> None:
        super().__init__(seed)
        if per_dataset < 1 or min(sizes) < 1:
            raise ValueError(f"need at least one sample per dataset, got sizes {list(sizes)}, share {per_dataset}")
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


class SimilarLengths(Sampler[int]):
    """Every index once, in an order in which a batch's samples are of similar lengths: little of it is padding.

    The order of the batches tells nothing of the lengths, so that the first few are like the others. The order is the
    same each time.

    Args:
        lengths: Of the samples, (N,).
        batch_size: Samples per batch.
    """

    def __init__(self, lengths: Tensor, batch_size: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = self.lengths.argsort(descending=True, stable=True)  # the shortest samples are the incomplete batch
        generator = torch.Generator().manual_seed(0)
        return iter(_in_similar_batches(order, self.lengths, self.batch_size, len(order), generator).tolist())


_AMONG = 32
"""Batches that training samples of similar lengths are looked for among: more of them leave less to chance."""


def _in_similar_batches(
    order: Tensor, lengths: Tensor, batch_size: int, among: int, generator: torch.Generator
) -> Tensor:
    """Puts samples of similar lengths in one batch, and the batches in a random order.

    Args:
        order: Indices (N,); those at its end that fill no batch stay there.
        lengths: Of all samples.
        batch_size: Samples per batch.
        among: How many consecutive samples of the order are sorted by length.
        generator: Draws the order of the batches.

    Returns:
        (N,).
    """
    whole = len(order) // batch_size * batch_size
    runs = [run[lengths[run].argsort(stable=True)] for run in order[:whole].split(among)]
    batches = torch.cat(runs).view(-1, batch_size)
    shuffled = batches[torch.randperm(len(batches), generator=generator)]
    return torch.cat([shuffled.flatten(), order[whole:]])


def training_loader(dataset: Dataset, sampler: EpochSampler, batch_size: int, num_workers: int = 0) -> DataLoader:
    """A loader for training.

    Args:
        dataset: Map-style dataset.
        sampler: Gives the order.
        batch_size: Images per batch. An incomplete last batch is dropped, unless it is the only one.
        num_workers: Worker processes.

    Returns:
        The loader; a fit that is interrupted can go on in the middle of its epoch.
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
    """A loader for measuring: every sample once.

    Args:
        dataset: Map-style dataset. If its samples are of different lengths, it has them as `lengths`, (N,).
        batch_size: Samples per batch; the last one may be smaller.
        num_workers: Worker processes.
        in_order: Whether samples of different lengths come in order too. That takes more padding.

    Returns:
        The loader.
    """
    lengths = None if in_order else lengths_of(dataset)
    return EvaluationLoader(
        dataset,
        batch_size=batch_size,
        sampler=None if lengths is None else SimilarLengths(lengths, batch_size),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # measuring draws nothing from the generator that training draws from
        collate_fn=collate,
    )


def names_of(dataset: Dataset) -> Sequence[str] | None:
    """What a dataset's samples are called (`sample_names`), such as their files, or None if it does not say."""
    if isinstance(dataset, Subset):
        names = names_of(dataset.dataset)
        return None if names is None else [names[index] for index in dataset.indices]
    return getattr(dataset, "sample_names", None)


def lengths_of(dataset: Dataset) -> Tensor | None:
    """The lengths of a dataset's samples, (N,), or None if it does not say that they differ."""
    if isinstance(dataset, Subset):
        lengths = lengths_of(dataset.dataset)
        return None if lengths is None else lengths[torch.as_tensor(dataset.indices)]
    return getattr(dataset, "lengths", None)
