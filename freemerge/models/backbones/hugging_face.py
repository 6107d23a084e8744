"""What all backbones from transformers have in common: loading, saving, and a quiet console."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from freemerge.checkpoints import expand, expand_name
from freemerge.models.backbones.base import Backbone

Dtype = Literal["float32", "bfloat16", "float16"]


class HuggingFaceBackbone(Backbone):
    """Base class of backbones from transformers; their folders are Hugging Face folders, with a recipe beside."""

    model: Any  # transformers' classes have few methods in common that their base class has

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the model as a Hugging Face folder, which transformers loads without freemerge."""
        directory = expand(directory)
        with without_progress_bars():
            self.model.save_pretrained(directory)
        self._write_recipe(directory)

    @classmethod
    def from_recipe(cls, directory: str | Path, arguments: dict[str, Any]) -> Backbone:
        """Build it again from its folder and the rest of its arguments."""
        build: Any = cls  # every subclass can be built so
        return build(pretrained=str(directory), **arguments)

    def load_folder(self, directory: str | Path) -> None:
        """Load the weights of a Hugging Face folder under any names that transformers knows."""
        with without_progress_bars():
            weights = (
                type(self.model).from_pretrained(directory, dtype=next(self.model.parameters()).dtype).state_dict()
            )
        own = self.model.state_dict().keys()
        self.model.load_state_dict({name: tensor for name, tensor in weights.items() if name in own})


def load_model(
    who: str,
    auto_class: Any,
    pretrained: str | None,
    config: dict[str, Any] | None,
    dtype: str,
    options: Any = None,
) -> Any:
    """A model of transformers in training mode, from a hub id or folder, or a configuration.

    Args:
        who: the beginning of error messages.
        auto_class: one of transformers' Auto classes, or a function of the model's configuration that chooses one.
        pretrained: hub id or local folder.
        config: configuration, `model_type` included.
        dtype: of the weights.
        options: a function of the model's configuration that gives further arguments of the model.

    Raises:
        ValueError: if not exactly one of `pretrained` and `config` is given, or it does not lead to a model.
    """
    from transformers import AutoConfig

    if (pretrained is None) == (config is None):
        raise ValueError(f"{who}: give either `pretrained` (hub id or folder) or `config`, not both")
    try:
        if pretrained is not None:
            pretrained = expand_name(pretrained)
            model_config = AutoConfig.from_pretrained(pretrained)
        else:
            settings = dict(config or {})
            if "model_type" not in settings:
                raise ValueError(f"{who}: `config` needs a `model_type`, for instance `vit`")
            model_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        auto = auto_class if hasattr(auto_class, "from_config") else auto_class(model_config)
        arguments = {"dtype": getattr(torch, dtype), **(options(model_config) if options else {})}
        if pretrained is None:
            return auto.from_config(model_config, **arguments)
        with without_progress_bars():
            model = auto.from_pretrained(pretrained, **arguments)
    except OSError as error:  # what transformers raises for an unknown id, a missing file, or no connection
        raise ValueError(f"{who}: {pretrained}: no model could be loaded from there ({_one_line(error)})") from error
    return model.train()  # transformers hands it out in eval mode, and Lightning keeps the mode: no dropout


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """transformers draws a bar for every file it reads or writes; it would tear a run's own output."""
    from transformers.utils import logging

    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            logging.enable_progress_bar()
