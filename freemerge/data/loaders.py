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
    """

    def __init__(self, size: int, seed: int) -> None:
        super().__init__(seed)
        self.size = size

    def __len__(self) -> int:
        return self.size

    def _order(self, generator: torch.Generator) -> Tensor:
        return torch.randperm(self.size, generator=generator)


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
        draws, offset = [], 0
        for size in self.sizes:
            rounds = -(-self.per_dataset // size)
            once = [torch.randperm(size, generator=generator) for _ in range(rounds)]
            draws.append(torch.cat(once)[: self.per_dataset] + offset)
            offset += size
        draws = torch.cat(draws)
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
        order = self.lengths.argsort(stable=True)
        whole = len(order) // self.batch_size * self.batch_size
        batches = order[len(order) - whole :].view(-1, self.batch_size)  # the shortest samples are the incomplete batch
        shuffled = batches[torch.randperm(len(batches), generator=torch.Generator().manual_seed(0))]
        return iter([*shuffled.flatten().tolist(), *order[: len(order) - whole].tolist()])


def training_loader(dataset: Dataset, sampler: EpochSampler, batch_size: int, num_workers: int = 0) -> DataLoader:
    """A loader for training.

    Args:
        dataset: Map-style dataset.
        sampler: Gives the order.
        batch_size: Images per batch. An incomplete last batch is dropped, unless it is the only one.
        num_workers: Worker processes.

    Returns:
        The loader.
    """
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=len(sampler) >= batch_size,  # type: ignore[arg-type]
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
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
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=None if lengths is None else SimilarLengths(lengths, batch_size),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=collate,
    )


def lengths_of(dataset: Dataset) -> Tensor | None:
    """The lengths of a dataset's samples, (N,), or None if it does not say that they differ."""
    if isinstance(dataset, Subset):
        lengths = lengths_of(dataset.dataset)
        return None if lengths is None else lengths[torch.as_tensor(dataset.indices)]
    return getattr(dataset, "lengths", None)
