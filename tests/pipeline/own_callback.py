"""A user's own callback, by import path."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint


class Diary(Callback):
    """Notes each epoch of a fit, how many it has seen itself, and what else the Trainer has.

    Args:
        path: where to.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.seen = 0

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen += 1
        keepers = [type(each).__name__ for each in trainer.callbacks if isinstance(each, ModelCheckpoint)]
        with Path(self.path).open("a") as file:
            print(type(pl_module).__name__, trainer.current_epoch, self.seen, *keepers, file=file)
