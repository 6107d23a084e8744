"""The common parts of all backbones from transformers: loading, saving, and no progress bars."""

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
    """Base class of backbones from transformers; their folders are Hugging Face folders with an additional recipe."""

    model: Any  # the base class of transformers' models lacks methods that all of them have

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the model as a Hugging Face folder, which transformers loads without freemerge.

        Args:
            directory: the folder, created if it is missing.
        """
        directory = expand(directory)
        with without_progress_bars():
            self.model.save_pretrained(directory)
        self._write_recipe(directory)

    @classmethod
    def from_recipe(cls, directory: str | Path, arguments: dict[str, Any]) -> Backbone:
        """Rebuild a backbone from its folder.

        Args:
            directory: the Hugging Face folder, passed as `pretrained`.
            arguments: the other arguments of the class.
        """
        build: Any = cls  # every subclass has the argument `pretrained`
        return build(pretrained=str(directory), **arguments)

    def load_folder(self, directory: str | Path) -> None:
        """Load the weights of a Hugging Face folder, with all names that transformers can convert.

        Args:
            directory: the folder.
        """
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
    """Load a model of transformers, or build a randomly initialised one.

    Args:
        who: the start of error messages.
        auto_class: one of transformers' Auto classes, or a function that returns one for the model's configuration.
        pretrained: hub id or local folder.
        config: configuration of a randomly initialised model, with its `model_type`.
        dtype: name of the weights' dtype.
        options: a function that returns further arguments of the model for its configuration.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: if not exactly one of `pretrained` and `config` is given, or no model can be loaded or built.
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
    except OSError as error:  # transformers raises it for an unknown id, a missing file, or no connection
        raise ValueError(f"{who}: {pretrained}: cannot load a model from it ({_one_line(error)})") from error
    return model.train()  # transformers returns it in evaluation mode, which Lightning would keep: no dropout


def _one_line(error: Exception) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hide transformers' progress bars, which would break a run's own output, for the duration of a block."""
    from transformers.utils import logging

    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            logging.enable_progress_bar()
