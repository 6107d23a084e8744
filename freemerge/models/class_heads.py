"""Heads by cosine: each class is a direction among the base's features, and the head is not trained.

- A *zero-shot* head has the embeddings of the classes' names in prompts, as CLIP's classifiers do (arXiv 2103.00020).
- A head of *prototypes* has the mean features of a few samples of each class (arXiv 1703.05175).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from freemerge.inputs import padding_of, select, to_device

if TYPE_CHECKING:
    from freemerge.models.backbones.base import Backbone

LOGIT_SCALE = 20.0
"""What the cosines of sentence encoders are multiplied by in their own training (sentence-transformers' default)."""

_PROMPTS_AT_ONCE = 256
_LONGEST_PROMPT = 512  # tokens, where neither the encoder nor its tokenizer says how many there may be


class CosineHead(nn.Module):
    """Features (B, F) → logits (B, C): scale · cos(features, direction of the class).

    Args:
        in_features: width F.
        out_features: number of classes C.
        scale: what cosines are multiplied by; it is saved with the directions, which start as zeros.
    """

    scale: Tensor

    def __init__(self, in_features: int, out_features: int, scale: float = LOGIT_SCALE) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.zeros(out_features, in_features), requires_grad=False)
        self.register_buffer("scale", torch.tensor(float(scale)))

    @classmethod
    def of(cls, directions: Tensor, scale: float = LOGIT_SCALE) -> CosineHead:
        """A head with these directions (C, F), on their device, in float32."""
        head = cls(directions.shape[1], directions.shape[0], scale).to(directions.device)
        head.weight.data.copy_(directions)
        return head

    def forward(self, features: Tensor) -> Tensor:
        # Without autocast: rounded to bfloat16, the logits of classes that are close would be equal.
        with _without_autocast(features.device.type):
            directions = F.normalize(self.weight, dim=-1)
            return self.scale * F.linear(F.normalize(features.to(directions.dtype), dim=-1), directions)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scale={float(self.scale):g}"


def _without_autocast(device: str) -> AbstractContextManager[None]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


# -- zero-shot --------------------------------------------------------------------------------------------------------


def class_embeddings(
    embed: Callable[[list[str]], Tensor], class_names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """One embedding per class: the mean of its prompts' normalised embeddings, normalised again.

    Args:
        embed: N texts → embeddings (N, F).
        class_names: C names; underscores are read as spaces, unless they stand between two spaces.
        templates: T prompts with one `{}` each.

    Returns:
        (C, F) float32.
    """
    readable = [re.sub("(?<! )_|_(?! )", " ", name) for name in class_names]
    prompts = [template.replace("{}", name) for name in readable for template in templates]
    parts = [embed(prompts[at : at + _PROMPTS_AT_ONCE]) for at in range(0, len(prompts), _PROMPTS_AT_ONCE)]
    each = F.normalize(torch.cat(parts).float(), dim=-1)  # (C · T, F)
    return F.normalize(each.unflatten(0, (len(class_names), len(templates))).mean(dim=1), dim=-1)


@torch.no_grad()
def embed_texts(backbone: Backbone, texts: Sequence[str], tokenizer: Any) -> Tensor:
    """Features (N, F) of texts by a backbone that reads them; its mode is kept.

    Args:
        backbone: takes what the tokenizer gives, by name.
        texts: N texts.
        tokenizer: the model's, of transformers.
    """
    most = getattr(backbone, "max_tokens", None) or min(tokenizer.model_max_length, _LONGEST_PROMPT)
    encoded = tokenizer(list(texts), truncation=True, max_length=most)
    inputs: dict[str, Tensor] = {
        name: pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding_of(name))
        for name, rows in encoded.items()
    }
    was_training = backbone.training
    backbone.eval()
    try:
        return backbone(to_device(inputs, _device(backbone)))
    finally:
        backbone.train(was_training)


def _device(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


# -- prototypes -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def prototypes(
    backbone: Backbone, loader: Iterable[Any], num_classes: int, per_class: int, device: torch.device
) -> Tensor:
    """Mean features of the first samples of each class; the backbone's mode is kept.

    No more samples go through the backbone than are averaged, and the loader is left as soon as all classes are full.

    Args:
        backbone: the base.
        loader: batches of (inputs, labels), in random order.
        num_classes: C.
        per_class: how many samples of each class; a class that has fewer takes what it has.
        device: where the backbone is.

    Returns:
        (C, F) float32.

    Raises:
        ValueError: if a class has no sample.
    """
    sums = torch.zeros(num_classes, backbone.feature_dim, device=device)
    missing = [per_class] * num_classes
    was_training = backbone.training
    backbone.eval()
    try:
        for inputs, labels in loader:
            rows = _still_missing(labels.tolist(), missing)
            if len(rows):
                features = backbone(to_device(select(inputs, rows), device)).float()  # (b, F)
                sums.index_add_(0, labels[rows].to(device), features)
            if not any(missing):
                break
    finally:
        backbone.train(was_training)
    if empty := [str(label) for label, count in enumerate(missing) if count == per_class]:
        raise ValueError(f"prototypes: no training sample is of class {', '.join(empty)}; use another head")
    return sums / (per_class - torch.tensor(missing, device=device)).unsqueeze(1)


def _still_missing(labels: Sequence[int], missing: list[int]) -> Tensor:
    """The rows of a batch whose classes are not full yet; counts them off."""
    rows = []
    for row, label in enumerate(labels):
        if missing[label] > 0:
            missing[label] -= 1
            rows.append(row)
    return torch.tensor(rows, dtype=torch.int64)
