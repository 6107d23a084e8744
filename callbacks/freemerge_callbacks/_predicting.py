"""Run a user's module on several tasks and leave the module unchanged."""

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
    """Put modules into evaluation mode on a device, without gradients, inside the block.

    Afterwards modes, devices and random number generators are restored. The mode is restored for each submodule,
    because some may have been frozen in evaluation mode.

    Args:
        modules: the modules.
        device: the device.
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

    Returns:
        Name in the module → tensor.

    Raises:
        ValueError: if `merged` belongs to another model.
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
    # Tensors excluded from a merge may be only in the module (its head) or only in the file (the base's head), but not
    # both.
    if not placed or (bare and len(placed) < len(checkpoint)):
        raise ValueError(
            f"{checkpoint.label}: its tensors are not those of the backbone '{backbone}' of {type(module).__name__}"
        )
    return {full: checkpoint.tensor(name).to(state[full].device, state[full].dtype) for full, name in placed.items()}


def own_names(module: nn.Module, backbone: str) -> dict[str, str]:
    """The names of a backbone's tensors in the module.

    Args:
        module: the module.
        backbone: dotted path of the backbone.

    Returns:
        Name as in `part_weights` → name in the module.
    """
    start = f"{backbone}." if backbone else ""
    body = module.get_submodule(backbone)
    if has_adapters(body):
        return {name.replace("_orig_mod.", ""): start + own for name, own in plain_names(body).items()}
    state = {name: value for name, value in module.state_dict().items() if name.startswith(start)}
    return dict(zip(relative(state, backbone), (n for n, v in state.items() if isinstance(v, Tensor)), strict=True))


def own_heads(
    module: nn.Module, backbone: str, head: str, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> set[str]:
    """Names of the module's tensors that a merge leaves out because they belong to a head.

    For excluded tensors a merged file holds the base's values. These are right for a part of the backbone. For a head
    inside the backbone they are untrained, so the module's own head is used instead.

    Args:
        module: the module.
        backbone: dotted path of the merged part; "" for the module itself.
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
    heads: Mapping[str, Callable[[Tensor], Any]] | None,
    weights: Mapping[str, Tensor],
    features: Features = None,
) -> Predict:
    """Make a function that runs the model at the Trainer's precision.

    Args:
        trainer: the Trainer, for its precision.
        module: the module; without `heads` its own forward returns logits.
        backbone: dotted path of the backbone; with `heads` it returns features.
        heads: task → head, from features to logits.
        weights: tensors to use instead of the module's own, under the module's names; the module is not changed.
        features: how to read the features from the backbone's output; see `find_features`.

    Returns:
        A function (inputs, task) → output.
    """
    # `functional_call` needs the original module, not the wrapper of `torch.compile`.
    body, weights = evaluated_part(module, "" if heads is None else backbone, weights)
    precision = trainer.precision_plugin

    def predict(inputs: Inputs, task: str) -> Any:
        inputs = precision.convert_input(inputs)
        with precision.forward_context():
            output = functional_call(body, weights, *arguments(body, inputs))
            return _logits(output) if heads is None else _logits(heads[task](find_features(output, features)))

    return predict


def evaluated_part(module: nn.Module, part: str, weights: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """A part of a module without its `torch.compile` wrapper, and weights for it.

    Args:
        module: the module.
        part: dotted path of the part; "" for the module itself.
        weights: tensors under the module's names.

    Returns:
        The part, and the tensors under the part's names.
    """
    body = module.get_submodule(part)
    body = getattr(body, "_orig_mod", body)
    start = len(part) + 1 if part else 0
    return body, {name[start:].removeprefix("_orig_mod."): tensor for name, tensor in weights.items()}


def arguments(body: nn.Module, inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """The arguments with which to call a module on a batch's inputs.

    A dict becomes keyword arguments and a tuple positional ones if `forward` accepts them; otherwise the inputs are one
    argument.

    Args:
        body: the module.
        inputs: the inputs of a batch.

    Returns:
        Positional and keyword arguments.
    """
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
    """Find the features in a backbone's output.

    Args:
        output: a tensor, or a dict such as transformers' models return.
        features: the key of the features in a dict, or a function output → features. None: `pooler_output`, or the
            only tensor (B, F) in the dict.

    Returns:
        (B, F).

    Raises:
        ValueError: if no features are found.
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
        f"cannot find the features in the backbone's output ({found}); pass features='key', or features=a function of "
        "the output"
    )


def _logits(output: Any) -> Any:
    """The logits in the output of a transformers or torchvision model; anything else is returned unchanged."""
    for key in ("logits", "out"):
        if isinstance(output, Mapping) and key in output:
            return output[key]
    return output


class Reweighted(nn.Module):
    """The evaluated part of a module with other weights, on which batch-norm statistics are measured.

    Args:
        trainer: the Trainer, for its precision.
        module: the module.
        backbone: dotted path of the backbone, whose statistics are measured.
        part: dotted path of the part to run: the backbone, or "" to run the module's own forward.
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
        """Run the part with the given weights.

        Args:
            inputs: the inputs of a batch.

        Returns:
            The part's output.
        """
        if isinstance(inputs, Mapping):
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        inputs = self._precision.convert_input(inputs)
        with self._precision.forward_context():
            return functional_call(self.body, self._weights, *arguments(self.body, inputs))

    def named(self, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename statistics of this wrapper's tensors to the module's names.

        Args:
            statistics: name in this wrapper → tensor.

        Returns:
            Name in the module → tensor; only the backbone's tensors.
        """
        found = {self._part + name.removeprefix("body."): value for name, value in statistics.items()}
        return {name: value for name, value in found.items() if name.startswith(self._backbone)}


def linear_head(path: str, who: str) -> nn.Linear:
    """Read a linear head from a file.

    Args:
        path: a task file, or a file with only `weight` (C, F) and optionally `bias` (C,).
        who: name of the callback, for error messages.

    Returns:
        A linear layer F → C.

    Raises:
        ValueError: if the file contains something else.
    """
    checkpoint = open_checkpoint(path)
    # A task file is recognised by its record, or by its names if it was saved again without metadata.
    if read_record(path) or any(name.startswith("backbone.") for name in checkpoint.names):
        checkpoint = open_checkpoint(path, prefix="head.")
    if set(checkpoint.names) not in ({"weight"}, {"weight", "bias"}) or len(checkpoint.spec("weight").shape) != 2:
        raise ValueError(
            f"{who}: {path}: expected a linear head, `weight` (C, F) and `bias`, found "
            f"{', '.join(checkpoint.names)}; pass a head of another kind as a module"
        )
    classes, features = checkpoint.spec("weight").shape
    head = nn.Linear(features, classes, bias="bias" in checkpoint, dtype=checkpoint.spec("weight").dtype)
    head.load_state_dict(dict(checkpoint))
    return head


def check_loaders(trainer: L.Trainer, loaders: Mapping[str, Iterable], who: str) -> None:
    """Check that every rank sees the same batches in the same order, so that the ranks can divide them exactly.

    Args:
        trainer: the Trainer.
        loaders: task → loader.
        who: name of the callback, for error messages.

    Raises:
        ValueError: if there is no loader, one shuffles or is already distributed, or the strategy shards the module.
    """
    from torch.utils.data import DistributedSampler, RandomSampler

    if not loaders:
        raise ValueError(f"{who}: there is no task to evaluate on; name at least one loader")
    if is_sharded(trainer.strategy):
        raise ValueError(
            f"{who}: {type(trainer.strategy).__name__} shards the module, so its ranks cannot evaluate different "
            "batches; remove this callback and evaluate the merged file afterwards, on one device"
        )
    for task, loader in loaders.items():
        sampler = getattr(loader, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            raise ValueError(f"{who}: the loader of '{task}' has a DistributedSampler; pass the plain loader")
        if trainer.world_size > 1 and isinstance(sampler, RandomSampler):
            raise ValueError(
                f"{who}: the loader of '{task}' shuffles, in another order on every rank; use shuffle=False"
            )
