"""Run somebody else's module on many tasks without leaving a trace in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.func import functional_call

from freemerge.checkpoints import open_checkpoint
from freemerge.checkpoints.bases import find_prefix
from freemerge.checkpoints.task_files import read_record
from freemerge.inputs import Inputs, select, to_device
from freemerge_callbacks._weights import is_sharded, relative

Predict = Callable[[Inputs, str], Any]


@contextmanager
def evaluating(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Modules in evaluation mode, without gradients, on `device`; then everything as it was, random numbers included.

    Every submodule gets its own mode back: some may have been frozen in evaluation mode.
    """
    modes = [(part, part.training) for module in modules for part in module.modules()]
    homes = [(module, next((tensor.device for tensor in module.parameters()), device)) for module in modules]
    # A loader draws a seed for its workers from the global generator whenever it is iterated.
    with torch.no_grad(), isolate_rng(include_cuda=False):
        try:
            for module in modules:
                module.eval().to(device)
            yield
        finally:
            for module, home in homes:
                module.to(home)
            for part, training in modes:
                part.training = training


def merged_into(module: nn.Module, backbone: str, merged: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A merged backbone's tensors under the module's own names, in its dtypes and on its devices.

    Args:
        module: the module whose backbone was merged.
        backbone: dotted path of the backbone.
        merged: tensors by name, or any file that `open_checkpoint` reads.

    Raises:
        ValueError: it is another model's.
    """
    start = f"{backbone}." if backbone else ""
    tensors = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    state = {name: tensor for name, tensor in tensors.items() if name.startswith(start)}
    by_name = dict(zip(relative(state, backbone), state, strict=True))
    checkpoint = open_checkpoint(merged)
    prefix = find_prefix(by_name, checkpoint.names)
    placed = {by_name[prefix + name]: name for name in checkpoint.names if prefix + name in by_name}
    bare = {name for name, value in module.named_parameters() if name in state and name not in placed}
    # What a merge excludes may be only in the module (its head) or only in the file (the base's head), never both.
    if not placed or (bare and len(placed) < len(checkpoint)):
        raise ValueError(
            f"{checkpoint.label}: its tensors are not those of the backbone '{backbone}' of {type(module).__name__}"
        )
    return {full: checkpoint.tensor(name).to(state[full].device, state[full].dtype) for full, name in placed.items()}


def predictor(
    trainer: L.Trainer,
    module: nn.Module,
    backbone: str,
    heads: Mapping[str, nn.Module] | None,
    weights: Mapping[str, Tensor],
) -> Predict:
    """(inputs, task) → what the model gives, with the Trainer's precision.

    Args:
        trainer: gives the precision.
        module: the module; without `heads` its own forward returns logits.
        backbone: dotted path of the backbone; with `heads` it returns features.
        heads: task → head, features to logits.
        weights: tensors to use instead of the module's own, under the module's names. The module keeps its own.
    """
    # `functional_call` needs the module itself, not what `torch.compile` made of it.
    body, weights = evaluated_part(module, "" if heads is None else backbone, weights)
    precision = trainer.precision_plugin

    def predict(inputs: Inputs, task: str) -> Any:
        inputs = precision.convert_input(inputs)
        with precision.forward_context():
            output = functional_call(body, weights, *arguments(body, inputs))
            return _logits(output) if heads is None else _logits(heads[task](output))

    return predict


def evaluated_part(module: nn.Module, part: str, weights: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """A part of a module as it was before `torch.compile`, and some of the module's tensors under the part's names."""
    body = module.get_submodule(part)
    body = getattr(body, "_orig_mod", body)
    start = len(part) + 1 if part else 0
    return body, {name[start:].removeprefix("_orig_mod."): tensor for name, tensor in weights.items()}


def arguments(body: nn.Module, inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """How a module is called with a batch's inputs: a dict by names where its `forward` takes them, else as one."""
    if isinstance(inputs, Mapping):
        try:
            inspect.signature(body.forward).bind(**inputs)
        except TypeError:
            return (inputs,), {}
        return (), dict(inputs)
    return (inputs,), {}


def _logits(output: Any) -> Any:
    """The logits in what a model of transformers returns; anything else as it is."""
    return output["logits"] if isinstance(output, Mapping) and "logits" in output else output


class Reweighted(nn.Module):
    """The part of a module that is evaluated, run with other weights: what batch-norm statistics are measured on.

    Args:
        trainer: gives the precision.
        module: the module.
        backbone: dotted path of the backbone, whose statistics are wanted.
        part: dotted path of what is run: the backbone, or "" where the module's own forward is.
        weights: tensors to use instead of the module's own, under the module's names.
    """

    def __init__(
        self, trainer: L.Trainer, module: nn.Module, backbone: str, part: str, weights: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.body, self._weights = evaluated_part(module, part, weights)
        self._precision = trainer.precision_plugin
        self._part, self._backbone = (f"{path}." if path else "" for path in (part, backbone))

    def forward(self, inputs: Any) -> Any:
        if isinstance(inputs, Mapping):
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        inputs = self._precision.convert_input(inputs)
        with self._precision.forward_context():
            return functional_call(self.body, self._weights, *arguments(self.body, inputs))

    def named(self, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The backbone's statistics, measured on this, under the module's names."""
        found = {self._part + name.removeprefix("body."): value for name, value in statistics.items()}
        return {name: value for name, value in found.items() if name.startswith(self._backbone)}


class Pairs:
    """A loader seen as pairs (inputs, labels): of the pairs that it yields, or of dicts that hold `labels`.

    Args:
        loader: the loader.
        task: its name, for messages.
        metric: what the task is judged by. The decoder of a seq2seq model reads the labels, too.
        who: what messages begin with.
    """

    def __init__(self, loader: Iterable, task: str, metric: Any, who: str) -> None:
        self.loader = loader
        self.task = task
        self.keeps_labels = getattr(metric, "kind", None) == "seq2seq"
        self.who = who

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """Yield the pairs.

        Raises:
            ValueError: the loader yields something else.
        """
        for batch in self.loader:
            if isinstance(batch, Mapping) and "labels" in batch:
                inputs = {name: value for name, value in batch.items() if self.keeps_labels or name != "labels"}
                yield inputs, batch["labels"]
            elif isinstance(batch, (tuple, list)) and len(batch) == 2:
                yield batch[0], batch[1]
            else:
                raise ValueError(
                    f"{self.who}: the loader of '{self.task}' must yield pairs (inputs, labels), or dicts with "
                    f"`labels`, and yields a {type(batch).__name__}"
                )


def count_classes(predict: Predict, loaders: Mapping[str, Iterable], device: torch.device, who: str) -> dict[str, int]:
    """Task → the number of logits that the model gives for it, from one sample.

    Raises:
        ValueError: a loader is empty, or the model does not return (B, C) logits.
    """
    counts = {}
    for task, loader in loaders.items():
        batch = next(iter(loader), None)
        if batch is None:
            raise ValueError(f"{who}: the loader of '{task}' must yield pairs (inputs, labels), and yields nothing")
        logits = predict(to_device(select(batch[0], slice(1)), device), task)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            found = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise ValueError(f"{who}: expected logits (B, C) for '{task}', got {found}; does it need heads={{...}}?")
        counts[task] = logits.shape[1]
    return counts


def linear_head(path: str, who: str) -> nn.Linear:
    """The linear head in a task file, or in a file of nothing but its `weight` (C, F) and, perhaps, `bias` (C,).

    Raises:
        ValueError: the file holds something else.
    """
    checkpoint = open_checkpoint(path, prefix="head." if read_record(path) else None)
    if set(checkpoint.names) not in ({"weight"}, {"weight", "bias"}) or len(checkpoint.spec("weight").shape) != 2:
        raise ValueError(
            f"{who}: {path}: expected a linear head, `weight` (C, F) and `bias`, and found "
            f"{', '.join(checkpoint.names)}; give a head of another kind as a module"
        )
    classes, features = checkpoint.spec("weight").shape
    head = nn.Linear(features, classes, bias="bias" in checkpoint, dtype=checkpoint.spec("weight").dtype)
    head.load_state_dict(dict(checkpoint))
    return head


def check_loaders(trainer: L.Trainer, loaders: Mapping[str, Iterable], who: str) -> None:
    """Require loaders over which the ranks can share the work exactly: every rank sees the same batches in one order.

    Raises:
        ValueError: there is none, one belongs to a part of the ranks or shuffles, or the strategy shards the module.
    """
    from torch.utils.data import DistributedSampler, RandomSampler

    if not loaders:
        raise ValueError(f"{who}: there is no task to evaluate on; name at least one loader")
    if is_sharded(trainer.strategy):
        raise ValueError(
            f"{who}: {type(trainer.strategy).__name__} shards the module, and its ranks cannot evaluate batches of "
            "their own; remove this callback and evaluate the merged file afterwards, on one device"
        )
    for task, loader in loaders.items():
        sampler = getattr(loader, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            raise ValueError(f"{who}: the loader of '{task}' has a DistributedSampler; give the plain loader")
        if trainer.world_size > 1 and isinstance(sampler, RandomSampler):
            raise ValueError(f"{who}: the loader of '{task}' shuffles, differently on every rank; use shuffle=False")
