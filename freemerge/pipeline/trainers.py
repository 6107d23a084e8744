"""A new Trainer for each fit, from one set of arguments.

It is Lightning's Trainer with all of its arguments. Because a run consists of many fits:

- Callbacks are copied for each fit, so that no state of one fit remains in the next.
- Loggers start a run for each fit, named after it: `finetune/birds`, `experts/birds`, `router`.
- A ModelCheckpoint writes to a folder for each fit. One that monitors a metric replaces freemerge's own, and
  `finetune.weights: best` uses its best checkpoint.
- Only the first fit prints the model summary.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ModelSummary

from freemerge.pipeline.loggers import make_loggers
from freemerge.training import BestCheckpoint


class MakeTrainer:
    """Makes a fresh Trainer for each fit, with its own copies of callbacks and loggers.

    Args:
        arguments: arguments of the Trainer; `logger` is as in `make_loggers`.
        trainer_class: the class of the Trainer, or a function that makes one.
    """

    def __init__(self, arguments: Mapping[str, Any], trainer_class: Callable[..., L.Trainer] = L.Trainer) -> None:
        self.arguments = dict(arguments)
        self.trainer_class = trainer_class
        self._is_summarized = False

    def __call__(
        self, folder: Path, name: str, overrides: Mapping[str, Any], callbacks: Sequence[Callback]
    ) -> L.Trainer:
        """Make the Trainer of one fit.

        Args:
            folder: the folder of logs and checkpoints, unless the arguments set one.
            name: name of the fit, such as `finetune/birds`.
            overrides: arguments that override those of all fits.
            callbacks: further callbacks. A `BestCheckpoint` among them is left out if the arguments have a
                ModelCheckpoint that monitors a metric.
        """
        given = {**self.arguments, **overrides}
        logger = make_loggers(given.pop("logger", None), folder, name)
        arguments = {**copy.deepcopy(given), "logger": logger}
        arguments["default_root_dir"] = arguments.get("default_root_dir") or str(folder)
        own = as_list(arguments.get("callbacks"))
        for each in own:
            if isinstance(each, ModelCheckpoint):
                _move(each, folder, name)
        if any(isinstance(each, ModelCheckpoint) and each.monitor for each in own):
            callbacks = [each for each in callbacks if not isinstance(each, BestCheckpoint)]
        keeps_nothing = arguments.get("fast_dev_run") or arguments.get("enable_checkpointing") is False
        arguments["callbacks"] = own + ([] if keeps_nothing else list(callbacks))
        if arguments.get("enable_model_summary") is None and not any(isinstance(each, ModelSummary) for each in own):
            arguments["enable_model_summary"] = not self._is_summarized
            self._is_summarized = True
        return self.trainer_class(**arguments)

    def without_logger(self, overrides: Mapping[str, Any]) -> L.Trainer:
        """The Trainer of a stage without loggers and profilers, whose construction can have side effects."""
        given = {name: value for name, value in {**self.arguments, **overrides}.items() if name != "profiler"}
        given["callbacks"] = as_list(given.get("callbacks"))  # a copy: Lightning appends to the list that it gets
        return self.trainer_class(**{**copy.deepcopy(given), "logger": False})

    def bare(self) -> L.Trainer:
        """A Trainer without callbacks and loggers; it tells which devices the fits will use."""
        bare = {
            name: value for name, value in self.arguments.items() if name not in ("callbacks", "logger", "profiler")
        }
        return self.trainer_class(**copy.deepcopy(bare), logger=False)


def as_list(callbacks: Any) -> list[Callback]:
    """The Trainer's argument `callbacks` as a list."""
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]


def best_of(trainer: L.Trainer) -> str:
    """The best checkpoint of a fit, by its first ModelCheckpoint that monitors a metric; "" if there is none."""
    monitoring = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint) and each.monitor]
    return monitoring[0].best_model_path if monitoring else ""


def _move(checkpoint: ModelCheckpoint, folder: Path, name: str) -> None:
    """Let a ModelCheckpoint write to this fit's own folder, which stays the same when the fit is resumed."""
    if checkpoint.dirpath is None:
        checkpoint.dirpath = str(folder / "checkpoints" / "own")
    else:
        checkpoint.dirpath = os.path.join(checkpoint.dirpath, name)
