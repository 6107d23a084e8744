"""Finished runs of the pipeline, loaded for further measurements."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

from freemerge.cli import FreemergeCLI, quieten
from freemerge.pipeline import SuiteRun

ONLY_FIT = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
"""Arguments of a Trainer that fits and writes no files."""


class FinishedRun(FreemergeCLI):
    """A run, built from the configuration in its folder.

    Args:
        folder: the run's folder.
        *options: command-line options, which override the configuration.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        super().__init__(["fit", "--config", str(folder / "config.yaml"), "--run.folder", str(folder), *options])

    def fit(self, model: Any, datamodule: Any, **_: Any) -> None:
        """Called instead of a fit: build the run that the stages would use."""
        self.suite_run: SuiteRun = self._suite_run(model, datamodule, self._get(self.config_init, "run").folder)


def be_quiet() -> None:
    """Silence Lightning and all warnings: a benchmark prints its own lines."""
    quieten()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
