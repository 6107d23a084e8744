"""Backbones: modules that turn a batch of inputs, images or tokens, into one feature vector per sample.

`Backbone` is what the rest of freemerge asks of one: a wrapped `model`, whose state dict is what gets merged (its names
are the model's own, so a merged file is loadable where the model came from), and a `forward` that pools its output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from freemerge.inputs import Inputs, to_device


class Backbone(nn.Module):
    """A feature extractor: inputs → features (B, `feature_dim`).

    Subclass it to bring a model of your own: wrap the model, say how wide its features are, and override `forward` if
    the model does not return them directly.

    Args:
        model: the module whose weights are fine-tuned and merged.
        feature_dim: width F of the features.
        pretrained: whether the weights come from pretraining, rather than from a random start.
    """

    def __init__(self, model: nn.Module, feature_dim: int, pretrained: bool = True) -> None:
        super().__init__()
        self.model = model
        self.feature_dim = feature_dim
        self.pretrained = pretrained

    def forward(self, inputs: Inputs) -> Tensor:
        """Features (B, F) of a batch of inputs: a tensor, or a dict of tensors that the model takes by name."""
        return self.model(inputs) if isinstance(inputs, Tensor) else self.model(**inputs)

    def weights(self) -> dict[str, Tensor]:
        """The tensors a merge works on: the wrapped model's state dict, detached, sharing memory with the model."""
        return {name: tensor.detach() for name, tensor in self.model.state_dict().items()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Copy `weights` (named as in `weights()`, all of them) into the model."""
        self.model.load_state_dict(weights, strict=True)


class TransformersBackbone(Backbone):
    """A vision or text encoder of the transformers library, from a hub id, a folder, or a configuration.

    A tensor of inputs is taken for images, a dict for what the model takes by name: a tokenizer's output, for instance.

    Args:
        pretrained: hub id or local folder to load configuration and weights from.
        config: configuration to build a randomly initialised model from, `model_type` included
            (for instance `{model_type: vit, hidden_size: 128, …}`). Give either this or `pretrained`.
        pooling: how token states (B, N, F) become features (B, F): `cls` takes the first token, `mean` averages an
            image's patch tokens, or a text's tokens where `attention_mask` is 1, `pooler` takes the model's own pooled
            output.
        dtype: of the weights while they are fine-tuned and merged, whatever they are stored in.

    Raises:
        ValueError: if not exactly one of `pretrained` and `config` is given.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        pooling: Literal["cls", "mean", "pooler"] = "cls",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        from transformers import AutoConfig, AutoModel

        if (pretrained is None) == (config is None):
            raise ValueError("TransformersBackbone: give either `pretrained` (hub id or folder) or `config`, not both")
        if pretrained is not None:
            options = _pooler_option(AutoConfig.from_pretrained(pretrained), pooling)
            with _without_progress_bars():
                model = AutoModel.from_pretrained(pretrained, dtype=getattr(torch, dtype), **options)
        else:
            settings = dict(config)
            if "model_type" not in settings:
                raise ValueError("TransformersBackbone: `config` needs a `model_type`, for instance `vit`")
            model_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
            model = AutoModel.from_config(
                model_config, dtype=getattr(torch, dtype), **_pooler_option(model_config, pooling)
            )
        super().__init__(model, feature_dim=model.config.hidden_size, pretrained=pretrained is not None)
        self.pooling = pooling
        self.prefix_tokens = _count_prefix_tokens(model)

    def forward(self, inputs: Inputs) -> Tensor:
        if isinstance(inputs, Tensor):
            inputs = {"pixel_values": inputs}
        output = self.model(**inputs)
        if self.pooling == "pooler":
            return output.pooler_output.flatten(1)  # some models pool to (B, F, 1, 1)
        tokens = output.last_hidden_state  # (B, N, F), or (B, F, H, W) of a convolutional network
        if tokens.ndim == 4:
            tokens = tokens.flatten(2).transpose(1, 2)  # (B, H·W, F)
        if self.pooling == "cls":
            return tokens[:, 0]
        if "attention_mask" in inputs:
            mask = inputs["attention_mask"].to(tokens.dtype).unsqueeze(2)  # (B, N, 1)
            return (tokens * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return tokens[:, self.prefix_tokens :].mean(dim=1)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the model as a Hugging Face folder, which `AutoModel.from_pretrained` loads without freemerge."""
        with _without_progress_bars():
            self.model.save_pretrained(directory)


def _count_prefix_tokens(model: nn.Module) -> int:
    """How many tokens of an image model come before the patches: class, distillation and register tokens."""
    tokens = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
    found = {name: tensor for name, tensor in model.named_parameters() if name.rsplit(".", 1)[-1] in tokens}
    return sum(tensor.shape[1] if tensor.ndim == 3 else 1 for tensor in found.values())


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """transformers draws a bar for every file it reads or writes; it would tear a run's own output."""
    from transformers.utils import logging

    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            logging.enable_progress_bar()


def _pooler_option(config: Any, pooling: str) -> dict[str, bool]:
    """ViT-like models add a pooler by default; features that do not use it should not carry its untrained weights."""
    from transformers import MODEL_MAPPING

    model_class = MODEL_MAPPING.get(type(config), None)
    accepts = model_class is not None and "add_pooling_layer" in model_class.__init__.__code__.co_varnames
    return {"add_pooling_layer": pooling == "pooler"} if accepts else {}


@torch.no_grad()
def extract_features(backbone: Backbone, loader: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features (N, F) float32 and labels (N,) of everything in `loader`, on the CPU; the backbone's mode is kept."""
    was_training = backbone.training
    backbone.eval()
    try:
        batches = [(backbone(to_device(inputs, device)).float().cpu(), labels.cpu()) for inputs, labels in loader]
    finally:
        backbone.train(was_training)
    return torch.cat([features for features, _ in batches]), torch.cat([labels for _, labels in batches])
