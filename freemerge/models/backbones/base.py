"""`Backbone`, the base class: a module that turns a batch of images or tokens into one feature vector per sample.

A backbone wraps a `model` and pools its output in `forward`. Merging works on the model's own state dict, so a merged
file can be loaded by the library that the model comes from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from freemerge.checkpoints import CheckpointError, expand, load_checkpoint, save_checkpoint
from freemerge.inputs import Inputs, named, to_device
from freemerge.models.class_heads import LOGIT_SCALE, CosineHead, class_embeddings, embed_texts
from freemerge.models.classes import import_class, is_builtin
from freemerge.names import class_name

RECIPE = "backbone.json"
WEIGHTS = "model.safetensors"


class Backbone(nn.Module):
    """A feature extractor: inputs → features (B, `feature_dim`).

    Subclass it for a model of your own: wrap the model, set the width of its features, and override `forward` if the
    model does not return features directly. Test the class with `freemerge.testing.check_backbone`.

    Args:
        model: the module whose weights are fine-tuned and merged.
        feature_dim: width F of the features.
        pretrained: whether the weights are pretrained; False if they are randomly initialised.
    """

    def __init__(self, model: nn.Module, feature_dim: int, pretrained: bool = True) -> None:
        super().__init__()
        self.model = model
        self.feature_dim = feature_dim
        self.pretrained = pretrained

    def forward(self, inputs: Inputs) -> Tensor:
        """The features of a batch.

        Args:
            inputs: (B, …), a tensor, or a dictionary of tensors that the model accepts as keyword arguments.

        Returns:
            (B, F).
        """
        return self.model(inputs) if isinstance(inputs, Tensor) else self.model(**named(inputs))

    def router_inputs(self, inputs: Inputs) -> Inputs:
        """The part of a batch that a router may read: all of it, unless it contains the answer.

        Args:
            inputs: (B, …), as for `forward`.
        """
        return inputs

    def weights(self) -> dict[str, Tensor]:
        """The tensors that a merge works on: the model's state dict, detached and without a copy."""
        return {name: tensor.detach() for name, tensor in self.model.state_dict().items()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Copy weights into the model.

        Args:
            weights: name → tensor, with all names of `weights()`.

        Raises:
            RuntimeError: if names or shapes differ.
        """
        self.model.load_state_dict(weights, strict=True)

    def enable_gradient_checkpointing(self) -> None:
        """Store few activations in training and recompute the others in the backward pass.

        Raises:
            ValueError: if the model does not support it.
        """
        enable = getattr(self.model, "gradient_checkpointing_enable", None)
        if enable is None or not getattr(self.model, "supports_gradient_checkpointing", True):
            raise ValueError(f"gradient_checkpointing: {type(self.model).__name__} does not support it; leave it out")
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # reentrant: no gradients for frozen inputs

    @property
    def reads_texts(self) -> bool:
        """Whether it can embed the names of classes, for a zero-shot head; a module of one's own is believed to."""
        return True

    def class_head(
        self, class_names: Sequence[str], templates: Sequence[str], tokenizer: Any = None, scale: float | None = None
    ) -> nn.Module:
        """A frozen zero-shot head: logits are scale · cosine of the features with the embeddings of the class names.

        Args:
            class_names: C names.
            templates: prompts with one `{}` each; a class's embedding is the mean over them.
            tokenizer: the model's, of transformers.
            scale: what cosines are multiplied by; None is 20.

        Returns:
            Features (B, F) → logits (B, C).

        Raises:
            ValueError: if there is no tokenizer.
        """
        if tokenizer is None:
            raise ValueError(
                f"a zero-shot head embeds class names, and this {type(self).__name__} needs the tokenizer of a task of "
                "texts for that; for images use an ImageTextBackbone, or head 'prototypes'"
            )
        embeddings = class_embeddings(lambda texts: embed_texts(self, texts, tokenizer), class_names, templates)
        return CosineHead.of(embeddings, LOGIT_SCALE if scale is None else scale)

    # -- as a folder --------------------------------------------------------------------------------------------------

    def recipe(self) -> dict[str, Any] | None:
        """The constructor arguments with which `load_backbone` rebuilds the backbone; None if it cannot be rebuilt."""
        return None

    @classmethod
    def resolve(cls, arguments: dict[str, Any], where: str, trust: bool) -> dict[str, Any]:
        """Replace class names in a recipe's arguments by objects; the base class has none to replace.

        Args:
            arguments: the result of `recipe`.
            where: the folder, for error messages.
            trust: whether classes from outside freemerge may be imported.

        Returns:
            The arguments of `from_recipe`.
        """
        return arguments

    @classmethod
    def from_recipe(cls, directory: str | Path, arguments: dict[str, Any]) -> Backbone:
        """Rebuild a backbone from its folder.

        Args:
            directory: the folder, with the weights.
            arguments: the result of `resolve`.
        """
        backbone = cls(**arguments)
        backbone.load_folder(directory)
        return backbone

    def load_folder(self, directory: str | Path) -> None:
        """Load the weights of a folder that `save_pretrained` of such a backbone wrote.

        Args:
            directory: the folder.

        Raises:
            CheckpointError: if they are the weights of another model.
        """
        try:
            self.load_weights(load_checkpoint(expand(directory) / WEIGHTS))
        except RuntimeError as error:
            detail = " ".join(str(error).split())
            raise CheckpointError(
                f"{directory}: its weights do not match this {type(self).__name__} ({detail})"
            ) from error

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a folder for `load_backbone`: the weights, and the recipe if there is one.

        Args:
            directory: the folder, created if it is missing.
        """
        directory = expand(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_checkpoint(directory / WEIGHTS, {name: tensor.cpu() for name, tensor in self.weights().items()})
        self._write_recipe(directory)

    def _write_recipe(self, directory: Path) -> None:
        """Write the class and its arguments, if there is a recipe."""
        if (arguments := self.recipe()) is not None:
            text = json.dumps({"class": class_name(type(self)), "arguments": arguments}, indent=2, ensure_ascii=False)
            (directory / RECIPE).write_text(text + "\n", encoding="utf-8")


def has_builtin_backbone(directory: str | Path) -> bool:
    """Whether a folder's backbone can be rebuilt from classes of freemerge alone.

    Args:
        directory: the folder.
    """
    try:
        recipe = json.loads((expand(directory) / RECIPE).read_text(encoding="utf-8"))
        return is_builtin(str(recipe["class"])) and "module" not in recipe["arguments"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load_backbone(directory: str | Path, trust_remote_code: bool = False) -> Backbone:
    """Load a folder written by `save_pretrained` of a backbone.

    Args:
        directory: the folder.
        trust_remote_code: whether a class from outside freemerge that the folder names may be imported, which runs its
            code.

    Returns:
        The backbone with the folder's weights.

    Raises:
        CheckpointError: if the folder has no recipe, or names a class that may not or cannot be imported or built.
    """
    import freemerge.models

    path = expand(directory) / RECIPE
    if not path.is_file():
        raise CheckpointError(f"{directory}: no {RECIPE}. Cannot rebuild the backbone; pass `backbone=`")
    recipe = json.loads(path.read_text(encoding="utf-8"))
    name, remedy = str(recipe.get("class")), "pass backbone=…"
    if is_builtin(name):
        kind = getattr(freemerge.models, name, None)
    else:
        kind = import_class(name, str(directory), "the backbone", remedy, trust_remote_code)
    if not (isinstance(kind, type) and issubclass(kind, Backbone)):
        raise CheckpointError(f"{path}: freemerge has no backbone {recipe.get('class')!r}")
    try:
        arguments = kind.resolve(recipe["arguments"], str(directory), trust_remote_code)
        return kind.from_recipe(expand(directory), arguments)
    except TypeError as error:
        raise CheckpointError(
            f"{directory}: the backbone is a {name} that cannot be built ({error}); {remedy}"
        ) from error


@torch.no_grad()
def extract_features(backbone: Backbone, loader: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """The features of all samples of a loader; the backbone's mode does not change.

    Args:
        backbone: the backbone, on `device`.
        loader: iterable of (inputs, labels).
        device: device to compute on.

    Returns:
        Features (N, F) float32 and labels (N,), on the CPU.
    """
    was_training = backbone.training
    backbone.eval()
    try:
        batches = [(backbone(to_device(inputs, device)).float().cpu(), labels.cpu()) for inputs, labels in loader]
    finally:
        backbone.train(was_training)
    return torch.cat([features for features, _ in batches]), torch.cat([labels for _, labels in batches])
