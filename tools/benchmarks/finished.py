"""Finished runs of the pipeline, as something to measure further on."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

from freemerge.cli import FreemergeCLI, quieten
from freemerge.pipeline import SuiteRun

ONLY_FIT = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
"""Arguments of a Trainer that fits, and leaves nothing behind but the module."""


class FinishedRun(FreemergeCLI):
    """A run, from the configuration that it left in its folder.

    Args:
        folder: the run's folder.
        *options: of the command line, over those of the configuration.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        super().__init__(["fit", "--config", str(folder / "config.yaml"), "--run.folder", str(folder), *options])

    def fit(self, model: Any, datamodule: Any, **_: Any) -> None:
        """In place of a fit: make what the stages would run on."""
        self.suite_run: SuiteRun = self._suite_run(model, datamodule)


def be_quiet() -> None:
    """No word from Lightning and no warning: a benchmark prints its own lines."""
    quieten()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
