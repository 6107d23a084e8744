"""Backbones: modules that turn a batch of inputs, images or tokens, into one feature vector per sample.

`Backbone` is what the rest of freemerge asks of one: a wrapped `model`, whose state dict is what gets merged (its names
are the model's own, so a merged file is loadable where the model came from), and a `forward` that pools its output.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from freemerge.checkpoints import CheckpointError, expand, load_checkpoint, save_checkpoint
from freemerge.inputs import Inputs, named, to_device
from freemerge.models.classes import import_class, is_builtin
from freemerge.names import class_name

RECIPE = "backbone.json"
WEIGHTS = "model.safetensors"


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
        return self.model(inputs) if isinstance(inputs, Tensor) else self.model(**named(inputs))

    def weights(self) -> dict[str, Tensor]:
        """The tensors a merge works on: the wrapped model's state dict, detached, sharing memory with the model."""
        return {name: tensor.detach() for name, tensor in self.model.state_dict().items()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Copy `weights` (named as in `weights()`, all of them) into the model."""
        self.model.load_state_dict(weights, strict=True)

    def enable_gradient_checkpointing(self) -> None:
        """Keep few activations while training and compute the others again in the backward pass.

        Raises:
            ValueError: if the model has no such switch.
        """
        enable = getattr(self.model, "gradient_checkpointing_enable", None)
        if enable is None or not getattr(self.model, "supports_gradient_checkpointing", True):
            raise ValueError(f"gradient_checkpointing: {type(self.model).__name__} does not support it; leave it out")
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # the reentrant kind loses frozen inputs

    # -- as a folder --------------------------------------------------------------------------------------------------

    def recipe(self) -> dict[str, Any] | None:
        """The constructor's arguments with which `load_backbone` builds it again; None if there are none."""
        return None

    @classmethod
    def resolve(cls, arguments: dict[str, Any], where: str, trust: bool) -> dict[str, Any]:
        """Replace names in a recipe's arguments by objects; by default there are none to replace.

        Args:
            arguments: what `recipe` said.
            where: the folder, for error messages.
            trust: whether classes from outside freemerge may be imported.
        """
        return arguments

    @classmethod
    def from_recipe(cls, directory: str | Path, arguments: dict[str, Any]) -> Backbone:
        """Build it again from its folder and what `recipe` said."""
        backbone = cls(**arguments)
        backbone.load_folder(directory)
        return backbone

    def load_folder(self, directory: str | Path) -> None:
        """Load the weights of a folder that `save_pretrained` of such a backbone wrote.

        Raises:
            CheckpointError: if they are those of another model.
        """
        try:
            self.load_weights(load_checkpoint(expand(directory) / WEIGHTS))
        except RuntimeError as error:
            said = " ".join(str(error).split())
            raise CheckpointError(f"{directory}: its weights do not fit this {type(self).__name__} ({said})") from error

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a folder that `load_backbone` loads: the weights, and the recipe where there is one."""
        directory = expand(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_checkpoint(directory / WEIGHTS, {name: tensor.cpu() for name, tensor in self.weights().items()})
        self._write_recipe(directory)

    def _write_recipe(self, directory: Path) -> None:
        if (arguments := self.recipe()) is not None:
            text = json.dumps({"class": class_name(type(self)), "arguments": arguments}, indent=2, ensure_ascii=False)
            (directory / RECIPE).write_text(text + "\n", encoding="utf-8")


def has_builtin_backbone(directory: str | Path) -> bool:
    """Whether `load_backbone` can load a folder without importing what is not freemerge's own."""
    try:
        recipe = json.loads((expand(directory) / RECIPE).read_text(encoding="utf-8"))
        return is_builtin(str(recipe["class"])) and "module" not in recipe["arguments"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load_backbone(directory: str | Path, trust_remote_code: bool = False) -> Backbone:
    """Load a folder written by `save_pretrained` of a backbone.

    Args:
        directory: the folder.
        trust_remote_code: whether a class from outside freemerge that the folder names may be imported.

    Raises:
        CheckpointError: if the folder does not say how to build its backbone, or by a class that may not be imported.
    """
    import freemerge.models

    path = expand(directory) / RECIPE
    if not path.is_file():
        raise CheckpointError(f"{directory}: no {RECIPE}. Cannot rebuild the backbone; pass `backbone=`")
    recipe = json.loads(path.read_text(encoding="utf-8"))
    name, give = str(recipe.get("class")), "pass backbone=…"
    if is_builtin(name):
        kind = getattr(freemerge.models, name, None)
    else:
        kind = import_class(name, str(directory), "the backbone", give, trust_remote_code)
    if not (isinstance(kind, type) and issubclass(kind, Backbone)):
        raise CheckpointError(f"{path}: freemerge has no backbone {recipe.get('class')!r}")
    try:
        arguments = kind.resolve(recipe["arguments"], str(directory), trust_remote_code)
        return kind.from_recipe(expand(directory), arguments)
    except TypeError as error:
        raise CheckpointError(f"{directory}: the backbone is a {name} that cannot be made ({error}); {give}") from error


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
