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

from freemerge.checkpoints import find_prefix, open_checkpoint, read_record
from freemerge.inputs import Inputs
from freemerge.merging import is_head
from freemerge.tensors import select
from freemerge_callbacks._adapters import has_adapters, plain_names
from freemerge_callbacks._weights import is_sharded, relative

Predict = Callable[[Inputs, str], Any]
Features = str | Callable[[Any], Tensor] | None


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
    by_name = own_names(module, backbone)
    checkpoint = open_checkpoint(merged)
    prefix = find_prefix(by_name, checkpoint.names)
    placed = {by_name[prefix + name]: name for name in checkpoint.names if prefix + name in by_name}
    parameters = {name for name, _ in module.named_parameters()}
    bare = {full for full in by_name.values() if full in parameters and full not in placed}
    # What a merge excludes may be only in the module (its head) or only in the file (the base's head), never both.
    if not placed or (bare and len(placed) < len(checkpoint)):
        raise ValueError(
            f"{checkpoint.label}: its tensors are not those of the backbone '{backbone}' of {type(module).__name__}"
        )
    return {full: checkpoint.tensor(name).to(state[full].device, state[full].dtype) for full, name in placed.items()}


def own_names(module: nn.Module, backbone: str) -> dict[str, str]:
    """For each tensor of the backbone as callbacks name it, its name in the module; see `part_weights`."""
    start = f"{backbone}." if backbone else ""
    body = module.get_submodule(backbone)
    if has_adapters(body):
        return {name.replace("_orig_mod.", ""): start + own for name, own in plain_names(body).items()}
    state = {name: value for name, value in module.state_dict().items() if name.startswith(start)}
    return dict(zip(relative(state, backbone), (n for n, v in state.items() if isinstance(v, Tensor)), strict=True))


def own_heads(
    module: nn.Module, backbone: str, head: str, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> set[str]:
    """The module's tensors that a merge leaves out because they are its head's.

    A merged file has the base's values of what was left out. For a part of the backbone these are meant; but where a
    head is inside of what is merged, the base's is untrained, and the module's own is meant.

    Args:
        module: the module.
        backbone: dotted path of what is merged; "" for the module itself.
        head: dotted path of the module's head.
        include: see `merge`.
        exclude: see `merge`.

    Returns:
        Their names in the module.
    """
    names = own_names(module, backbone)
    merged = set(select(names, include, exclude))
    return {
        name for plain, name in names.items() if plain not in merged and (name.startswith(f"{head}.") or is_head(plain))
    }


def predictor(
    trainer: L.Trainer,
    module: nn.Module,
    backbone: str,
    heads: Mapping[str, nn.Module] | None,
    weights: Mapping[str, Tensor],
    features: Features = None,
) -> Predict:
    """(inputs, task) → what the model gives, with the Trainer's precision.

    Args:
        trainer: gives the precision.
        module: the module; without `heads` its own forward returns logits.
        backbone: dotted path of the backbone; with `heads` it returns features.
        heads: task → head, features to logits.
        features: what of the backbone's output the heads are given; see `find_features`.
        weights: tensors to use instead of the module's own, under the module's names. The module keeps its own.
    """
    # `functional_call` needs the module itself, not what `torch.compile` made of it.
    body, weights = evaluated_part(module, "" if heads is None else backbone, weights)
    precision = trainer.precision_plugin

    def predict(inputs: Inputs, task: str) -> Any:
        inputs = precision.convert_input(inputs)
        with precision.forward_context():
            output = functional_call(body, weights, *arguments(body, inputs))
            return _logits(output) if heads is None else _logits(heads[task](find_features(output, features)))

    return predict


def evaluated_part(module: nn.Module, part: str, weights: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """A part of a module as it was before `torch.compile`, and some of the module's tensors under the part's names."""
    body = module.get_submodule(part)
    body = getattr(body, "_orig_mod", body)
    start = len(part) + 1 if part else 0
    return body, {name[start:].removeprefix("_orig_mod."): tensor for name, tensor in weights.items()}


def arguments(body: nn.Module, inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """How a module is called with a batch's inputs: the values of a dict by their names, and those of a tuple one by
    one, where its `forward` takes them so; else all as one."""
    positional = tuple(inputs) if isinstance(inputs, (tuple, list)) else ()
    named = dict(inputs) if isinstance(inputs, Mapping) else {}
    if not positional and not named:
        return (inputs,), {}
    try:
        inspect.signature(body.forward).bind(*positional, **named)
    except TypeError:
        return (inputs,), {}
    return positional, named


def find_features(output: Any, features: Features = None) -> Tensor:
    """The features (B, F) in what a backbone returns.

    Args:
        output: a tensor, or a dict such as transformers' models return.
        features: the key of the features in a dict, or a function that takes them out of any output. None: its
            `pooler_output`, or the only tensor (B, F) in it.

    Raises:
        ValueError: they cannot be found.
    """
    if callable(features):
        return features(output)
    if isinstance(output, Tensor) and features is None:
        return output
    tensors = (
        {key: value for key, value in output.items() if isinstance(value, Tensor)}
        if isinstance(output, Mapping)
        else {}
    )
    flat = [key for key, value in tensors.items() if value.ndim == 2]
    key = features or ("pooler_output" if "pooler_output" in tensors else flat[0] if len(flat) == 1 else None)
    if key in tensors:
        return tensors[key]
    found = ", ".join(f"{key} {list(value.shape)}" for key, value in tensors.items()) or f"a {type(output).__name__}"
    raise ValueError(
        f"the backbone returns {found}; say what the heads are given: features='key', or features=a function of the "
        "output"
    )


def _logits(output: Any) -> Any:
    """The logits in what a model of transformers or torchvision returns; anything else as it is."""
    for key in ("logits", "out"):
        if isinstance(output, Mapping) and key in output:
            return output[key]
    return output


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


def linear_head(path: str, who: str) -> nn.Linear:
    """The linear head in a task file, or in a file of nothing but its `weight` (C, F) and, perhaps, `bias` (C,).

    Raises:
        ValueError: the file holds something else.
    """
    checkpoint = open_checkpoint(path)
    # Of a task file the head; names tell it from the backbone also where its metadata have been left out.
    if read_record(path) or any(name.startswith("backbone.") for name in checkpoint.names):
        checkpoint = open_checkpoint(path, prefix="head.")
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
