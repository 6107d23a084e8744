"""Checks that pass a few real samples of a task through the real backbone and a head, as a fit does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from freemerge.data import TaskData, collate, lengths_of
from freemerge.inputs import Inputs, batch_size, select, tensors_of, to_device
from freemerge.models import Backbone
from freemerge.pipeline.checks.findings import Findings
from freemerge.pipeline.checks.labels import check_values
from freemerge.training import FineTuner

_FEW = 2  # samples that go through the model


class Samples:
    """The first batch of a task's train and val data.

    Args:
        data: the task's data module.
        findings: receives the faults and doubts.
    """

    def __init__(self, data: TaskData, findings: Findings) -> None:
        self.task = data.task
        self.findings = findings
        data.num_workers = 0  # starting workers takes longer than one batch
        self.batches: dict[str, Inputs] = {}
        self.labels: dict[str, Tensor] = {}
        for split in ("train", "val"):
            if len(getattr(self.task, split)):
                self._take(split, getattr(data, f"{split}_dataloader")())

    def _take(self, split: str, loader: Any) -> None:
        batch = next(iter(loader))
        where = f"task {self.task.name!r}, {split}"
        if not isinstance(batch, (list, tuple)) or len(batch) != 2:
            found = f"{len(batch)} parts" if isinstance(batch, (list, tuple)) else type(batch).__name__
            self.findings.fault(
                f"{where}: a batch is {found}, expected (inputs, label); let the dataset give these two"
            )
            return
        inputs, labels = batch
        if not tensors_of(inputs):
            self.findings.fault(f"{where}: the inputs hold no tensor; let the dataset turn them into tensors")
            return
        if not check_values(self.task, split, labels, self.findings):
            return
        sizes = sorted({len(tensor) for tensor in tensors_of(inputs) if tensor.dim()} | {len(labels)})
        if len(sizes) > 1:
            self.findings.fault(
                f"{where}: the parts of a batch have {' and '.join(map(str, sizes))} samples; all need one size"
            )
            return
        if any(part.is_floating_point() and not bool(part.isfinite().all()) for part in tensors_of(inputs)):
            self.findings.fault(
                f"{where}: the first batch contains NaN or infinite values; correct the data or their normalisation"
            )
            return
        self.batches[split], self.labels[split] = inputs, labels

    def few(self, split: str) -> tuple[Inputs, Tensor]:
        """The samples that go through the model: the longest texts if lengths are known, otherwise the first.

        Args:
            split: `train` or `val`.

        Returns:
            Inputs and labels of at most two samples.
        """
        dataset = getattr(self.task, split)
        lengths = lengths_of(dataset)
        if lengths is None:
            return select(self.batches[split], slice(_FEW)), self.labels[split][:_FEW]
        longest = lengths.argsort(descending=True)[:_FEW].tolist()
        fetch = getattr(dataset, "__getitems__", None)
        inputs, labels = collate(fetch(longest) if fetch else [dataset[index] for index in longest])
        return inputs, labels

    # -- checks -------------------------------------------------------------------------------------------------------

    def check_pixels(self, backbone: Backbone) -> None:
        """Check that images are floating point, with a mean near 0 and a standard deviation near 1."""
        for split, inputs in self.batches.items():
            images = [part for part in tensors_of(inputs) if part.dim() == 4]
            for part in images:
                if not part.is_floating_point():
                    self.findings.fault(
                        f"task {self.task.name!r}, {split}: images are {str(part.dtype).removeprefix('torch.')}, "
                        "expected float32; let the dataset convert and normalise them"
                    )
                elif (doubt := _unusual(part, backbone.pretrained)) is not None:
                    self.findings.doubt(f"task {self.task.name!r}: {split} images {doubt}")

    def check_model(self, tuner: FineTuner, device: torch.device, may_fail: bool) -> None:
        """Check that backbone, head, loss and metric compute on the samples.

        Args:
            tuner: the module; its backbone is on `device`.
            device: where to compute.
            may_fail: whether the run computes on another device, so that a failure here is only a doubt.
        """
        for split in self.batches:
            inputs, labels = self.few(split)
            say = self.findings.doubt if may_fail else self.findings.fault
            try:
                features = tuner.backbone(cast_for(tuner.backbone, to_device(inputs, device)))
            except Exception as error:  # a model may raise anything
                say(
                    f"task {self.task.name!r}, {split}: {_model_name(tuner.backbone)} cannot take its inputs, "
                    f"{describe(inputs)}: {_reason(error)}{_advice(tuner.backbone, inputs)}"
                )
                continue
            self._check_outputs(tuner, split, features, labels.to(device))

    def _check_outputs(self, tuner: FineTuner, split: str, features: Any, labels: Tensor) -> None:
        where = f"task {self.task.name!r}, {split}"
        if not isinstance(features, Tensor):
            self.findings.fault(
                f"{where}: the backbone gives {type(features).__name__}, expected a tensor of features (B, "
                f"{tuner.backbone.feature_dim}); let its forward take them out"
            )
            return
        if bool((features.isnan() | features.isposinf()).any()):
            self.findings.fault(
                f"{where}: the backbone's output is NaN or infinite before any training; look at its weights, the "
                "data's normalisation and its dtype"
            )
            return
        try:
            objective = tuner.objective_of(self.task)
            own = self.task.kind in ("seq2seq", "causal_lm")
            head = tuner.new_head(objective.num_outputs).to(features.device)
            outputs = head(features.float())
            metrics = objective.make_metrics().to(features.device)
            objective.update(metrics, outputs, labels)
            loss = objective.loss(outputs, labels)
        except Exception as error:  # user-defined heads and metrics may raise anything
            self.findings.fault(
                f"{where}: head, loss or {self.task.metric} cannot be computed from features {tuple(features.shape)} "
                f"of a backbone whose feature_dim is {tuner.backbone.feature_dim}: {_reason(error)}"
            )
            return
        if not bool(loss.isfinite()) and not own:  # a text that was cut off before its target has no loss
            self.findings.fault(f"{where}: the loss is {float(loss):g} before any training; look at labels and inputs")


def cast_for(backbone: Backbone, inputs: Inputs) -> Inputs:
    """Inputs cast to the dtype of the backbone's weights, as the Trainer's precision plugin casts them."""
    dtype = next((each.dtype for each in backbone.parameters() if each.is_floating_point()), torch.float32)
    if isinstance(inputs, Tensor):
        return inputs.to(dtype) if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {name: cast_for(backbone, part) for name, part in inputs.items()}
    return type(inputs)(cast_for(backbone, part) for part in inputs) if type(inputs) in (tuple, list) else inputs


def _unusual(images: Tensor, pretrained: bool) -> str | None:
    """Describe what is unusual about the values of images (B, C, H, W); None if nothing is."""
    low, high = float(images.min()), float(images.max())
    mean, spread = float(images.float().mean()), float(images.float().std())
    if high > 20 and low >= 0:
        return (
            f"go from {low:g} to {high:g}: they look like bytes that were not normalised; divide them by 255, "
            "subtract a mean and divide by a std"
        )
    if abs(mean) > 5 or spread > 10:
        return f"have mean {mean:.3g} and spread {spread:.3g}, models expect about 0 and 1; look at mean and std"
    if spread < 1e-4:
        return f"are all {mean:.3g} in the first batch; look at the files, and at mean and std"
    if pretrained and low >= 0 and high <= 1:
        return (
            f"go from {low:g} to {high:g}, and pretrained models mostly expect them normalised to a mean of 0; "
            "look at mean and std"
        )
    return None


def describe(inputs: Inputs) -> str:
    """Describe the dtype and the shape of one sample's inputs, such as `float32 (3, 32, 32)`; named inputs by name."""
    if isinstance(inputs, Tensor):
        return f"{str(inputs.dtype).removeprefix('torch.')} {tuple(inputs.shape[1:])}"
    if isinstance(inputs, Mapping):
        return "{" + ", ".join(f"{name}: {describe(part)}" for name, part in inputs.items()) + "}"
    return f"({', '.join(map(describe, inputs))})" if isinstance(inputs, (tuple, list)) else type(inputs).__name__


def _model_name(backbone: Backbone) -> str:
    """The class of the backbone's model, and the image size and channels from its configuration."""
    config = getattr(backbone.model, "config", None)
    config = getattr(config, "vision_config", config)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    known = [f"image_size {size}"] if isinstance(size, (int, list, tuple)) else []
    known += [f"num_channels {channels}"] if isinstance(channels, int) else []
    name = type(backbone.model).__name__
    return f"{name} ({', '.join(known)})" if known else name


def _advice(backbone: Backbone, inputs: Inputs) -> str:
    """Suggest what to do about inputs that the model cannot take."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if isinstance(ids, Tensor) and batch_size(inputs):
        return _token_advice(backbone, ids)
    if isinstance(inputs, Tensor) and inputs.dim() == 4:
        return "; set the data's image_size and channels to what the model takes, or take another model"
    return "; let the dataset give what the model's forward takes, by name"


def _token_advice(backbone: Backbone, ids: Tensor) -> str:
    embeddings = getattr(backbone.model, "get_input_embeddings", lambda: None)()
    known = getattr(embeddings, "num_embeddings", None)
    if isinstance(known, int) and int(ids.max()) >= known:
        return f"; there is a token {int(ids.max())} and the model knows {known}: use the model's own tokenizer"
    most = getattr(getattr(backbone.model, "config", None), "max_position_embeddings", None)
    if isinstance(most, int) and ids.shape[1] > most:
        return f"; a text has {ids.shape[1]} tokens and the model takes {most}: set max_length"
    return "; look at the tokenizer and at max_length"


def _reason(error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 300 else f"{said[:299]}…"
