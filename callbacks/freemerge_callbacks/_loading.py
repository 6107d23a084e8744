"""Iterate over a user's loaders as the Trainer's validation would, and leave the loaders unchanged.

- A batch passes through the same hooks (such as `on_after_batch_transfer`) as in the Trainer's own validation, because
  projects normalise, crop and augment there.
- Each pass uses a new iterator, because the Trainer may be in the middle of the same loader.
- The state of a loader's generators is restored, because the training loader may share them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from freemerge_callbacks._ranks import on_rank_zero

_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


@dataclass(frozen=True)
class Source:
    """Where the batches of a task come from.

    Args:
        loader: the loader.
        data: the data module that it belongs to; None for a plain loader.
    """

    loader: Iterable
    data: Any = None

    def batches(self, trainer: L.Trainer) -> Iterator[Any]:
        """Iterate over the batches, after the batch-transfer hooks.

        Args:
            trainer: the Trainer.

        Yields:
            Batches, after the hooks of the data module (of the Trainer's for a plain loader), or else of the module.
        """
        before, move, after = (_hook(name, trainer, self.data) for name in _HOOKS)
        for batch in _twin(self.loader):
            batch = before(batch, 0) if before else batch
            batch = move(batch, trainer.strategy.root_device, 0) if move else batch
            yield after(batch, 0) if after else batch


def open_source(trainer: L.Trainer, value: Any, split: str, who: str, task: str) -> Source:
    """Open the loader of one task.

    Args:
        trainer: the Trainer.
        value: a loader or a data module.
        split: "val" or "test"; used with a data module.
        who: name of the callback, for error messages.
        task: the task's name, for messages.

    Returns:
        The source of batches.

    Raises:
        ValueError: if the data module has several loaders.
    """
    loader, data = (loaders_of(trainer, value, split), value) if is_data_module(value) else (combined(value), None)
    if data is not None and isinstance(loader, (list, tuple)) and len(loader) == 1:
        loader = loader[0]
    several = isinstance(loader, (list, tuple)) and any(isinstance(each, DataLoader) for each in loader)
    if several or isinstance(loader, Mapping):
        found = value if data is None else f"{type(data).__name__}.{split}_dataloader()"
        names = f" ({', '.join(map(repr, loader))})" if isinstance(loader, Mapping) else ""
        found = found if isinstance(found, str) else f"a {type(found).__name__}"
        raise ValueError(
            f"{who}: expected one loader for '{task}', found {len(loader)} in {found}{names}; name a task for each: "
            "loaders={'task': loader}"
        )
    return Source(loader, data)


def loaders_of(trainer: L.Trainer, data: Any, split: str) -> Any:
    """A data module's loaders for a split, after it has been set up as by a Trainer.

    Args:
        trainer: the Trainer; every rank must call this.
        data: the data module.
        split: "val" or "test".

    Returns:
        A loader, or a list or dict of loaders; a CombinedLoader is unpacked.
    """
    if getattr(data, "trainer", None) is None:
        data.trainer = trainer
    on_rank_zero(trainer, data.prepare_data)
    data.setup("validate" if split == "val" else "test")
    return combined(getattr(data, f"{split}_dataloader")())


def combined(loaders: Any) -> Any:
    """Unpack a CombinedLoader of `lightning` or `pytorch_lightning`.

    Args:
        loaders: any loaders.

    Returns:
        The CombinedLoader's loaders; anything else is returned unchanged.
    """
    return loaders.iterables if type(loaders).__name__ == "CombinedLoader" else loaders


def is_data_module(value: Any) -> bool:
    """Check for a data module of `lightning` or `pytorch_lightning`.

    Args:
        value: any object.

    Returns:
        True if it has the methods of a data module.
    """
    return all(hasattr(value, name) for name in ("prepare_data", "setup", "val_dataloader"))


@contextmanager
def as_in_validation(trainer: L.Trainer, split: str, loaders: Iterable[Any]) -> Iterator[None]:
    """Set the Trainer's stage to validating (or testing) inside the block, and restore the generators afterwards.

    Hooks and modules read `trainer.training` to decide whether to augment.

    Args:
        trainer: the Trainer.
        split: "val" or "test".
        loaders: the loaders whose generators are restored.
    """
    states = [(generator, generator.get_state()) for loader in loaders for generator in _generators(loader)]
    stage, function = trainer.state.stage, trainer.state.fn
    if split == "val":
        trainer.validating = True
    else:
        trainer.testing = True
    trainer.state.fn = function
    try:
        yield
    finally:
        trainer.state.stage = stage
        for generator, state in states:
            generator.set_state(state)


def _hook(name: str, trainer: L.Trainer, data: Any) -> Any:
    """The project's own hook, or None: Lightning's default only moves tensors to the device, as evaluation does."""
    owners = (data if data is not None else getattr(trainer, "datamodule", None), trainer.lightning_module)
    hooks = (getattr(owner, name, None) for owner in owners)
    return next((hook for hook in hooks if hook is not None and not _is_lightning(hook)), None)


def _is_lightning(hook: Any) -> bool:
    return getattr(hook, "__module__", "").startswith(("lightning.pytorch.", "pytorch_lightning."))


def _twin(loader: Iterable) -> Iterable:
    """A copy of a loader with its own iterator, also with persistent workers."""
    if not isinstance(loader, DataLoader):
        return loader
    twin = copy.copy(loader)
    twin._iterator = None
    return twin


def _generators(loader: Any) -> list[torch.Generator]:
    samplers = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    samplers.append(getattr(samplers[-1], "sampler", None))
    found = [getattr(owner, "generator", None) for owner in (loader, *samplers)]
    return [generator for generator in found if isinstance(generator, torch.Generator)]
