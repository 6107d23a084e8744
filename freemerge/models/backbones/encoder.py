"""TransformersBackbone: any vision or text encoder of the transformers library."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from freemerge.inputs import Inputs, named
from freemerge.models.backbones.hugging_face import Dtype, HuggingFaceBackbone, load_model


class TransformersBackbone(HuggingFaceBackbone):
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
        ValueError: if not exactly one of `pretrained` and `config` is given, or it does not lead to a model.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        pooling: Literal["cls", "mean", "pooler"] = "cls",
        dtype: Dtype = "float32",
    ) -> None:
        from transformers import AutoModel

        model = load_model(
            type(self).__name__, AutoModel, pretrained, config, dtype, lambda config: _pooler_option(config, pooling)
        )
        super().__init__(model, feature_dim=_width(model.config), pretrained=pretrained is not None)
        self.pooling = pooling
        self.dtype = dtype
        self.prefix_tokens = _count_prefix_tokens(model)
        self.max_tokens = _count_positions(model)

    def forward(self, inputs: Inputs) -> Tensor:
        given = {"pixel_values": inputs} if isinstance(inputs, Tensor) else named(inputs)
        ids = given.get("input_ids")
        if ids is not None and self.max_tokens is not None and ids.shape[1] > self.max_tokens:
            raise ValueError(
                f"{type(self).__name__}: a text has {ids.shape[1]} tokens, and the model has positions for "
                f"{self.max_tokens}: set the data's max_length: {self.max_tokens}"
            )
        output = self.model(**given)
        if self.pooling == "pooler":
            return output.pooler_output.flatten(1)  # some models pool to (B, F, 1, 1)
        tokens = output.last_hidden_state  # (B, N, F), or (B, F, H, W) of a convolutional network
        if tokens.ndim == 4:
            tokens = tokens.flatten(2).transpose(1, 2)  # (B, H·W, F)
        if self.pooling == "cls":
            return tokens[:, 0]
        mask = given.get("attention_mask")
        if mask is not None and mask.shape == tokens.shape[:2]:
            mask = mask.to(tokens.dtype).unsqueeze(2)  # (B, N, 1)
            return (tokens * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return tokens[:, self.prefix_tokens :].mean(dim=1)

    def recipe(self) -> dict[str, Any]:
        return {"pooling": self.pooling, "dtype": self.dtype}


def _width(config: Any) -> int:
    """Width of the last hidden states."""
    return config.hidden_size if hasattr(config, "hidden_size") else config.hidden_sizes[-1]


def _count_prefix_tokens(model: nn.Module) -> int:
    """How many tokens of an image model come before the patches: class, distillation and register tokens."""
    tokens = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
    found = [tensor for name, tensor in model.named_parameters() if name.rsplit(".", 1)[-1] in tokens]
    return sum(tensor.shape[1] if tensor.ndim == 3 else 1 for tensor in found)


def _count_positions(model: nn.Module) -> int | None:
    """How many tokens of a text have a learned position; None if positions are computed or the inputs are not texts."""
    for name, module in model.named_modules():
        if name.endswith("embeddings.position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa's positions begin after the padding token's.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def _pooler_option(config: Any, pooling: str) -> dict[str, bool]:
    """ViT-like models add a pooler by default; features that do not use it should not carry its untrained weights."""
    from transformers import MODEL_MAPPING

    model_class: Any = MODEL_MAPPING.get(type(config), None)
    accepts = model_class is not None and "add_pooling_layer" in model_class.__init__.__code__.co_varnames
    return {"add_pooling_layer": pooling == "pooler"} if accepts else {}
