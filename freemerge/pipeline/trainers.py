"""Every fit's own Trainer, from one set of arguments."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger


class MakeTrainer:
    """Makes a fresh Trainer for each fit, with its own copies of callbacks and loggers.

    Args:
        arguments: of the Trainer.
        trainer_class: the class of the Trainer.
    """

    def __init__(self, arguments: Mapping[str, Any], trainer_class: type[L.Trainer] = L.Trainer) -> None:
        self.arguments = dict(arguments)
        self.trainer_class = trainer_class

    def __call__(self, folder: Path, overrides: Mapping[str, Any], callbacks: list[Callback]) -> L.Trainer:
        """A Trainer.

        Args:
            folder: where it logs and keeps checkpoints, unless the arguments say otherwise.
            overrides: arguments over those of all fits.
            callbacks: further callbacks; a ModelCheckpoint among them gives way to one of the arguments'.
        """
        arguments = {**copy.deepcopy(self.arguments), **overrides}
        arguments["default_root_dir"] = arguments.get("default_root_dir") or str(folder)
        if arguments.get("logger") in (None, True):
            arguments["logger"] = CSVLogger(folder, name="logs")  # a resumed fit gets a version of its own
        own = arguments.get("callbacks") or []
        keeps_nothing = arguments.get("fast_dev_run") or arguments.get("enable_checkpointing") is False
        arguments["callbacks"] = (own if isinstance(own, list) else [own]) + ([] if keeps_nothing else callbacks)
        return self.trainer_class(**arguments)
