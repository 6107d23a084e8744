"""`ImageTextBackbone`: the image tower of CLIP, SigLIP and similar models; the text tower provides the heads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from freemerge.checkpoints import expand, expand_name
from freemerge.inputs import Inputs
from freemerge.models.backbones.hugging_face import Dtype, HuggingFaceBackbone, load_model, without_progress_bars
from freemerge.models.class_heads import class_embeddings


class TextTower:
    """The text tower, which is neither trained nor merged; copies of a backbone share it.

    Args:
        model: the model without its image tower.
        tokenizer: hub id or folder of the tokenizer; None if there is none.
    """

    def __init__(self, model: nn.Module, tokenizer: str | None) -> None:
        self.model: Any = model.requires_grad_(False).eval()
        self.tokenizer = None if tokenizer is None else expand_name(tokenizer)

    def __deepcopy__(self, memo: dict) -> TextTower:
        return self

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embed texts.

        Args:
            texts: N texts, truncated to the model's length.

        Returns:
            (N, F), normalised to length 1.

        Raises:
            ValueError: if there is no tokenizer.
        """
        from transformers import AutoTokenizer

        if self.tokenizer is None:
            raise ValueError("ImageTextBackbone: a zero-shot head needs `tokenizer` (hub id or folder)")
        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        # SigLIP was trained on texts padded to its full length, without a mask.
        padding = "max_length" if self.model.config.model_type.startswith("siglip") else True
        length = self.model.config.text_config.max_position_embeddings
        tokens = tokenizer(list(texts), padding=padding, truncation=True, max_length=length, return_tensors="pt")
        features = self.model.get_text_features(**tokens)
        return F.normalize(getattr(features, "pooler_output", features), dim=-1)


class ImageTextBackbone(HuggingFaceBackbone):
    """The image tower of a dual encoder; its features are normalised image embeddings (B, F).

    The image tower and its projection are fine-tuned and merged, under their names in the whole model. The text tower
    does not change and provides the heads: one embedding per class, from prompts (zero-shot classification, arXiv
    2103.00020).

    Args:
        pretrained: hub id or local folder to load the configuration, weights and tokenizer from.
        config: configuration of a randomly initialised model, with its `model_type`. Give either this or `pretrained`.
        tokenizer: hub id or folder of the tokenizer; None is `pretrained`.
        dtype: dtype of the weights in fine-tuning and merging, whatever dtype they are stored in.

    Raises:
        ValueError: if not exactly one of `pretrained` and `config` is given, or the model is not a dual encoder.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        dtype: Dtype = "float32",
    ) -> None:
        from transformers import AutoModel

        who = type(self).__name__
        whole = load_model(who, AutoModel, pretrained, config, dtype)
        if not (hasattr(whole, "get_image_features") and hasattr(whole, "get_text_features")):
            raise ValueError(f"{who}: {type(whole).__name__} has no image and text towers; use TransformersBackbone")
        image, text = (_tower(whole, of_text) for of_text in (False, True))
        width = getattr(whole.config, "projection_dim", None)  # SigLIP has none, so the tower's own width is used
        super().__init__(image, width or whole.config.vision_config.hidden_size, pretrained=pretrained is not None)
        self.text = TextTower(text, tokenizer or pretrained)
        self.dtype = dtype

    def forward(self, inputs: Inputs) -> Tensor:
        """The features of images (B, C, H, W) → (B, F), normalised to length 1."""
        output = self.model.get_image_features(pixel_values=inputs)
        return F.normalize(getattr(output, "pooler_output", output), dim=-1)

    def class_head(
        self, class_names: Sequence[str], templates: Sequence[str], tokenizer: Any = None, scale: float | None = None
    ) -> nn.Linear:
        """A frozen linear head whose weights are the classes' text embeddings times the logit scale.

        Args:
            class_names: C names.
            templates: prompts with one `{}` each; a class's embedding is the normalised mean over all prompts.
            tokenizer: not used; the text tower has its own.
            scale: what cosines are multiplied by; None is what the model was trained with.

        Returns:
            Features (B, F) → logits (B, C) = scale · cosine (+ SigLIP's bias), with the model's logit scale.

        Raises:
            ValueError: if there is no tokenizer.
        """
        trained = getattr(self.text.model, "logit_scale", None)
        if scale is None:
            scale = 1.0 if trained is None else float(trained.exp())
        bias = getattr(self.text.model, "logit_bias", None)
        head = nn.Linear(self.feature_dim, len(class_names))
        with torch.no_grad():
            head.weight.copy_(class_embeddings(self.text.embed, class_names, templates) * scale)
            head.bias.fill_(float(bias) if bias is not None else 0.0)
        return head.requires_grad_(False)

    def recipe(self) -> dict[str, Any]:
        """The constructor arguments that a folder stores; see `Backbone.recipe`."""
        return {"dtype": self.dtype}

    def save_pretrained(self, directory: str | Path) -> None:
        """Write both towers as one Hugging Face folder, with the tokenizer if there is one.

        Args:
            directory: the folder, created if it is missing.
        """
        directory = expand(directory)
        whole = copy.copy(self.model)
        whole.__dict__["_modules"] = {**self.model._modules, **self.text.model._modules}
        whole.__dict__["_parameters"] = {**self.model._parameters, **self.text.model._parameters}
        with without_progress_bars():
            whole.save_pretrained(directory)
            if self.text.tokenizer is not None:
                from transformers import AutoTokenizer

                AutoTokenizer.from_pretrained(self.text.tokenizer).save_pretrained(directory)
        self._write_recipe(directory)


def _tower(whole: nn.Module, of_text: bool) -> nn.Module:
    """A copy of the model with the modules of one tower only; the text tower has the scale and bias of the logits.

    Its methods, such as `get_image_features`, and the names of its weights are those of the whole model.
    """
    tower = copy.copy(whole)
    modules = {name: module for name, module in whole._modules.items() if name.startswith("text") == of_text}
    tower.__dict__["_modules"] = modules
    tower.__dict__["_parameters"] = dict(whole._parameters) if of_text else {}
    return tower
