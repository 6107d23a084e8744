"""Backbones from outside transformers: torchvision's models and any `nn.Module`."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from freemerge.checkpoints import load_checkpoint
from freemerge.inputs import Inputs, named
from freemerge.models.backbones.base import WEIGHTS, Backbone
from freemerge.models.classes import class_and_arguments, import_class, instantiate


class TorchvisionBackbone(Backbone):
    """A classification model of torchvision without its last layer, whose inputs are the features.

    Args:
        name: name of the model, such as `resnet50` or `convnext_tiny`; see `torchvision.models.list_models()`.
        weights: `DEFAULT` or a name such as `IMAGENET1K_V2` downloads pretrained weights; null initialises randomly.
        file: local file of weights to load instead, with or without the last layer.
        options: further arguments of the model.

    Raises:
        ValueError: if there is no such model, it cannot be built, it does not end in a linear layer, or `weights` and
            `file` are both given.
    """

    def __init__(
        self,
        name: str,
        weights: str | None = None,
        file: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        from torchvision import models

        who = type(self).__name__
        known = models.list_models(module=models)
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{who}: torchvision has no classification model {name!r}{hint}")
        if weights is not None and file is not None:
            raise ValueError(f"{who}: give either `weights` or `file`, not both")
        try:
            model = models.get_model(name, weights=weights, **(options or {}))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{who}: {name} cannot be built ({error})") from error
        linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        last = linear[-1] if linear else None
        if last is None:
            raise ValueError(f"{who}: {name} does not end in a linear layer; wrap it in ModuleBackbone")
        width = model.get_submodule(last).in_features
        parent, _, attribute = last.rpartition(".")
        setattr(model.get_submodule(parent), attribute, nn.Identity())
        super().__init__(model, width, pretrained=weights is not None or file is not None)
        self.arguments = {"name": name, "options": options}
        if file is not None:
            state = load_checkpoint(file)
            self.load_weights({key: tensor for key, tensor in state.items() if not key.startswith(f"{last}.")})

    def forward(self, inputs: Inputs) -> Tensor:
        """The features of images (B, C, H, W) → (B, F)."""
        output = self.model(inputs)
        return output if isinstance(output, Tensor) else output[0]  # Inception has auxiliary outputs in training

    @property
    def reads_texts(self) -> bool:
        return False

    def recipe(self) -> dict[str, Any]:
        """The constructor arguments that a folder stores; see `Backbone.recipe`."""
        return self.arguments

    @classmethod
    def from_recipe(cls, directory: str | Path, arguments: dict[str, Any]) -> Backbone:
        """Rebuild a backbone from its folder.

        Args:
            directory: the folder, with the weights.
            arguments: the other arguments of the class.
        """
        return cls(**arguments, file=str(Path(directory) / WEIGHTS))


class ModuleBackbone(Backbone):
    """Any `nn.Module`, in configurations by its class path.

    Maps (B, F, H, W) and tokens (B, N, F) are averaged to features (B, F).

    Args:
        module: the module, without a head.
        feature_dim: width F of the features; None uses the module's attribute `feature_dim` or `num_features`.
        features: method of the module that returns the features, such as `forward_features`; None calls the module.
        file: file of weights to load, in any format that a merge reads; None keeps the module's weights.
        pretrained: whether the weights are pretrained; None is true if there is a `file`.

    Raises:
        ValueError: if the width of the features is unknown, or the module has no such method.
    """

    def __init__(
        self,
        module: nn.Module,
        feature_dim: int | None = None,
        features: str | None = None,
        file: str | None = None,
        pretrained: bool | None = None,
    ) -> None:
        who = f"ModuleBackbone: {type(module).__name__}"
        width = feature_dim or getattr(module, "feature_dim", None) or getattr(module, "num_features", None)
        if not isinstance(width, int):
            raise ValueError(f"{who} has no `feature_dim` or `num_features`; pass `feature_dim=`")
        if features is not None and not callable(getattr(module, features, None)):
            raise ValueError(f"{who} has no method {features!r}; give the name of one in `features`")
        super().__init__(module, width, pretrained=file is not None if pretrained is None else pretrained)
        self.features = features
        if file is not None:
            self.load_weights(load_checkpoint(file))

    def recipe(self) -> dict[str, Any] | None:
        """The module's class and arguments, from its `recipe()` or its configuration, and the settings."""
        if (made := class_and_arguments(self.model, "ModuleBackbone: the module")) is None:
            return None
        rest = {"feature_dim": self.feature_dim, "features": self.features, "pretrained": self.pretrained}
        return {"module": made, **rest}

    @classmethod
    def resolve(cls, arguments: dict[str, Any], where: str, trust: bool) -> dict[str, Any]:
        """Replace the module's class and arguments by the module; see `Backbone.resolve`."""
        made, what, remedy = arguments["module"], "the backbone's module", "pass backbone=…"
        kind = import_class(made["class"], where, what, remedy, trust)
        return {**arguments, "module": instantiate(kind, made["arguments"], where, what, remedy)}

    def forward(self, inputs: Inputs) -> Tensor:
        """The features of a batch; see `Backbone.forward`."""
        call = self.model if self.features is None else getattr(self.model, self.features)
        output = call(inputs) if isinstance(inputs, Tensor) else call(**named(inputs))
        if output.ndim == 4:
            return output.mean(dim=(2, 3))
        return output.mean(dim=1) if output.ndim == 3 else output
