"""StatisticsAtFitEnd: measure what RegMean or Fisher merging merges by, on data of the task, when a fit ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from freemerge.checkpoints import expand, save_checkpoint
from freemerge.inputs import batch_size, select, to_device
from freemerge.merging import GramMatrices, SquaredGradients, draw_log_probability, measurable_layers
from freemerge_callbacks._adapters import has_adapters, plain_names
from freemerge_callbacks._batches import BatchFormat
from freemerge_callbacks._best import best_checkpoint, best_state, check_weights, completed
from freemerge_callbacks._loading import Source, as_in_validation, combined, is_data_module, loaders_of
from freemerge_callbacks._predicting import Features, arguments, evaluated_part, evaluating, own_names, predictor
from freemerge_callbacks._ranks import on_rank_zero
from freemerge_callbacks._weights import get_part, is_dev_run, is_sharded, refuse_placeholders, whole_state

_WHO = "StatisticsAtFitEnd"
_Measured = Literal["gram_matrices", "squared_gradients"]


class StatisticsAtFitEnd(Callback):
    """Writes statistics of the fine-tuned model on its own data, for `RegMean` or `FisherMerging`, when the fit ends.

        StatisticsAtFitEnd("tasks/cars.gram.safetensors")
        python -m freemerge merge … --method RegMean --method.statistics tasks/cars.gram.safetensors …

    The model computes in evaluation mode on a few batches; weights, modes and random number generators stay as they
    are. Rank 0 measures, on its part of the training data, while the others wait.

    Args:
        output: the .safetensors file to write.
        statistics: "gram_matrices", the Gram matrices of the inputs of linear layers and convolutions over images, for
            RegMean; or "squared_gradients", the diagonal of the Fisher information, for FisherMerging, one sample at a
            time with an answer drawn from the model's own softmax.
        samples: how many samples to measure.
        loader: the data: a loader, or a data module whose validation data are taken. None: the fit's training loader.
        backbone: dotted path of the module's attribute that holds the backbone; "" for the module itself.
        head: dotted path of the head from the backbone's features to logits (B, C), for squared gradients. None: the
            module's own forward returns the logits.
        weights: "last", the weights at the end of the fit, or "best", those of the best checkpoint of the Trainer's
            ModelCheckpoint: the same as for TaskCheckpoint.
        inputs: the key of a batch's inputs, or several keys. None: the first entry, or everything but the labels.
        adapt: batch → (inputs, labels); replaces `inputs`.
        features: how to read the features from a backbone that returns a dict: their key, or a function of the output.
        seed: of the drawn answers.
        overwrite: whether to replace an existing `output`.

    Attributes:
        saved_path: the file written; None before.

    Raises:
        ValueError: an argument is invalid.
    """

    def __init__(
        self,
        output: str,
        statistics: _Measured = "gram_matrices",
        samples: int = 256,
        loader: DataLoader | L.LightningDataModule | None = None,
        backbone: str = "backbone",
        head: str | None = "head",
        weights: Literal["last", "best"] = "last",
        inputs: str | int | list[str] | list[int] | None = None,
        adapt: Callable | None = None,
        features: str | Callable | None = None,
        seed: int = 0,
        overwrite: bool = False,
    ) -> None:
        self.output = expand(output).absolute()
        self.statistics = statistics
        self.samples = samples
        self.loader = loader
        self.backbone = backbone
        self.head = head
        self.weights = weights
        self.format = BatchFormat(_WHO, inputs, None, adapt)
        self.features: Features = features
        self.seed = seed
        self.overwrite = overwrite
        self.saved_path: Path | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the arguments before the fit.

        Args:
            trainer: the Trainer.
            pl_module: not used; it may be incomplete.
            stage: checks are made for "fit" only.

        Raises:
            ValueError: if an argument is invalid.
        """
        if stage != "fit" or is_dev_run(trainer):
            return
        self.saved_path = None
        if self.statistics not in get_args(_Measured):
            raise ValueError(f"{_WHO}: `statistics` must be one of {get_args(_Measured)}, got {self.statistics!r}")
        if self.samples < 1:
            raise ValueError(f"{_WHO}: `samples` must be at least 1, got {self.samples}")
        if self.output.suffix != ".safetensors":
            raise ValueError(f"{_WHO}: {self.output}: the output must be a .safetensors file")
        if self.output.exists() and not self.overwrite:
            raise ValueError(f"{_WHO}: {self.output} exists already; choose another path, or set overwrite=True")
        refuse_placeholders(trainer.strategy, _WHO)
        if is_sharded(trainer.strategy):
            raise ValueError(
                f"{_WHO}: {type(trainer.strategy).__name__} shards the module, so no rank can compute with it alone; "
                "measure afterwards, on one device"
            )
        check_weights(trainer, self.weights, _WHO)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that the module has the parts, and that they can be measured.

        Args:
            trainer: the Trainer.
            pl_module: the module.

        Raises:
            ValueError: if a part is missing or cannot be measured.
        """
        if is_dev_run(trainer):
            return
        body = get_part(pl_module, self.backbone, _WHO)
        if self.statistics == "gram_matrices":
            if not measurable_layers(body):
                raise ValueError(f"{_WHO}: '{self.backbone}' has no linear layers and no convolutions over images")
            return
        if has_adapters(body):
            raise ValueError(
                f"{_WHO}: '{self.backbone}' has PEFT adapters, beside which the weights have no gradients; measure "
                "gram_matrices, or the squared gradients of the fused model"
            )
        if self.head is not None and self.backbone:
            get_part(pl_module, self.head, _WHO, "head")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the statistics and write them.

        Args:
            trainer: the Trainer.
            pl_module: the module.
        """
        if is_dev_run(trainer):
            return
        state, source = whole_state(trainer, pl_module), self._source(trainer)
        self.saved_path = on_rank_zero(trainer, lambda: self._write(trainer, pl_module, state, source))
        rank_zero_info(f"{_WHO}: wrote {self.statistics.replace('_', ' ')} to {self.saved_path}")

    def _write(self, trainer: L.Trainer, module: L.LightningModule, state: Mapping[str, Any], source: Source) -> Path:
        if self.weights == "best":
            found = best_state(best_checkpoint(trainer, _WHO).best_model_path, self.backbone, _WHO)
            state = completed(found, module, state, self.backbone, _WHO)
        device = trainer.strategy.root_device
        with evaluating([module], device):
            weights = _once(module, state, device)
            batches = self._batches(trainer, source)
            if self.statistics == "gram_matrices":
                measured = self._gram_matrices(trainer, module, weights, batches)
            else:
                with torch.enable_grad():
                    measured = self._squared_gradients(trainer, module, weights, batches)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(self.output, measured)
        return self.output

    def _gram_matrices(
        self, trainer: L.Trainer, module: nn.Module, weights: Mapping[str, Tensor], batches: Iterable[Any]
    ) -> dict[str, Tensor]:
        body, own = evaluated_part(module, self.backbone, _inside(weights, self.backbone))
        adapters = plain_names(body) if has_adapters(body) else None
        layers = measurable_layers(body)
        if adapters is not None:  # an adapter's own factors are no weights of the merged model
            layers = {name: layer for name, layer in layers.items() if f"{name}.weight" in adapters.values()}
        precision = trainer.precision_plugin
        with GramMatrices(layers) as grams:
            for inputs in batches:
                converted = precision.convert_input(inputs)
                with precision.forward_context():
                    functional_call(body, own, *arguments(body, converted))
        found = grams.tensors()
        if adapters is None:
            return found
        return {plain: found[name] for plain, name in adapters.items() if name in found}

    def _squared_gradients(
        self, trainer: L.Trainer, module: nn.Module, weights: Mapping[str, Tensor], batches: Iterable[Any]
    ) -> dict[str, Tensor]:
        parameters = {name for name, _ in module.named_parameters()}
        own = {plain: name for plain, name in own_names(module, self.backbone).items() if name in parameters}
        leaves = {plain: weights[name].detach().requires_grad_() for plain, name in own.items() if name in weights}
        used = {**weights, **{own[plain]: leaf for plain, leaf in leaves.items()}}
        heads, part = None, ""
        if self.head is not None and self.backbone:
            head, values = evaluated_part(module, self.head, _inside(weights, self.head))
            heads, part = {"": lambda features: functional_call(head, values, features)}, self.backbone
        predict = predictor(trainer, module, self.backbone, heads, _inside(used, part), self.features)
        squares, generator = SquaredGradients(leaves), torch.Generator().manual_seed(self.seed)
        for inputs in batches:
            for index in range(batch_size(inputs)):
                outputs = predict(select(inputs, slice(index, index + 1)), "")
                if not isinstance(outputs, Tensor) or outputs.ndim not in (2, 3):
                    shape = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
                    raise ValueError(f"{_WHO}: expected logits (B, C) or (B, L, V), the model returns {shape}")
                distribution: Any = "classes" if outputs.ndim == 2 else "tokens"
                squares.add(draw_log_probability(outputs, generator, distribution))
        return squares.tensors()

    def _batches(self, trainer: L.Trainer, source: Source) -> Iterator[Any]:
        """Inputs of batches on the device, with `samples` samples in all."""
        left = self.samples
        with as_in_validation(trainer, "val", [source.loader]):
            for batch in islice(source.batches(trainer), self.samples):
                inputs = to_device(self.format.inputs_of(batch, "the task"), trainer.strategy.root_device)
                count = batch_size(inputs)
                yield select(inputs, slice(0, left)) if count > left else inputs
                left -= count
                if left <= 0:
                    return
        if left == self.samples:
            raise ValueError(f"{_WHO}: the loader yields no batch")

    def _source(self, trainer: L.Trainer) -> Source:
        """Where the batches come from; every rank must call this, as data modules prepare their data together."""
        given = self.loader
        if given is not None and is_data_module(given):
            return Source(_only(loaders_of(trainer, given, "val")), given)
        if given is not None:
            return Source(combined(given))
        found = trainer.train_dataloader
        return Source(_only(combined(found)), getattr(trainer, "datamodule", None))


def _only(loaders: Any) -> Any:
    """The one loader in a list of one."""
    several = isinstance(loaders, Mapping) or (isinstance(loaders, (list, tuple)) and len(loaders) != 1)
    if several:
        raise ValueError(f"{_WHO}: there are {len(loaders)} loaders; name the one to measure on with loader=...")
    return loaders[0] if isinstance(loaders, (list, tuple)) else loaders


def _inside(weights: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors of a part of the module, under the module's names."""
    return {name: value for name, value in weights.items() if not part or name.startswith(f"{part}.")}


def _once(module: nn.Module, state: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """A module's tensors on a device, a tied one by its first name alone: `functional_call` ties the others to it."""
    names: dict[int, str] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        names.setdefault(id(value), name)
    return {name: state[name].to(device) for name in names.values() if isinstance(state.get(name), Tensor)}
