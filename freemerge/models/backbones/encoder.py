"""`TransformersBackbone`: vision and text encoders of the transformers library."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from freemerge.inputs import Inputs, named
from freemerge.models.backbones.hugging_face import Dtype, HuggingFaceBackbone, load_model


class TransformersBackbone(HuggingFaceBackbone):
    """A vision or text encoder of the transformers library, from a hub id, a folder, or a configuration.

    Inputs that are a tensor are passed as `pixel_values`, inputs that are a dictionary by name, such as a tokenizer's
    output.

    Args:
        pretrained: hub id or local folder to load the configuration and weights from.
        config: configuration of a randomly initialised model, with its `model_type`, for instance
            `{model_type: vit, hidden_size: 128, …}`. Give either this or `pretrained`.
        pooling: how token states (B, N, F) become features (B, F): `cls` uses the first token, `mean` the mean of an
            image's patch tokens or of a text's tokens whose `attention_mask` is 1, `pooler` the model's own pooled
            output.
        dtype: dtype of the weights in fine-tuning and merging, whatever dtype they are stored in.

    Raises:
        ValueError: if not exactly one of `pretrained` and `config` is given, or no model can be loaded or built.
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
        """The features of a batch; see `Backbone.forward`.

        Raises:
            ValueError: if a text has more tokens than the model has positions.
        """
        given = {"pixel_values": inputs} if isinstance(inputs, Tensor) else named(inputs)
        ids = given.get("input_ids")
        if ids is not None and self.max_tokens is not None and ids.shape[1] > self.max_tokens:
            raise ValueError(
                f"{type(self).__name__}: a text has {ids.shape[1]} tokens, and the model has {self.max_tokens} "
                f"positions; set the data's max_length: {self.max_tokens}"
            )
        output = self.model(**given)
        if self.pooling == "pooler":
            return output.pooler_output.flatten(1)  # some models return (B, F, 1, 1)
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

    @property
    def reads_texts(self) -> bool:
        return self.model.main_input_name == "input_ids"

    def recipe(self) -> dict[str, Any]:
        """The constructor arguments that a folder stores; see `Backbone.recipe`."""
        return {"pooling": self.pooling, "dtype": self.dtype}


def _width(config: Any) -> int:
    """The width of the last hidden states."""
    return config.hidden_size if hasattr(config, "hidden_size") else config.hidden_sizes[-1]


def _count_prefix_tokens(model: nn.Module) -> int:
    """The number of tokens of an image model before its patches: class, distillation and register tokens."""
    tokens = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
    found = [tensor for name, tensor in model.named_parameters() if name.rsplit(".", 1)[-1] in tokens]
    return sum(tensor.shape[1] if tensor.ndim == 3 else 1 for tensor in found)


def _count_positions(model: nn.Module) -> int | None:
    """The number of learned positions of a text model; None if positions are computed or the inputs are not texts."""
    for name, module in model.named_modules():
        if name.endswith("embeddings.position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa's positions begin after that of the padding token.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def _pooler_option(config: Any, pooling: str) -> dict[str, bool]:
    """The argument that leaves out a pooler that the features do not use, as its weights would be untrained."""
    from transformers import MODEL_MAPPING

    model_class: Any = MODEL_MAPPING.get(type(config), None)
    accepts = model_class is not None and "add_pooling_layer" in model_class.__init__.__code__.co_varnames
    return {"add_pooling_layer": pooling == "pooler"} if accepts else {}
