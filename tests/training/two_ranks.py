"""Each of two ranks draws random numbers of its own. A fit that is stopped within an epoch and resumed draws the same
numbers on each rank as an uninterrupted one.

    python tests/training/two_ranks.py FOLDER
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import lightning as L
import torch

from freemerge.data import ArrayDataset
from freemerge.data.loaders import ShuffleSampler, training_loader
from freemerge.training.resume import EpochStart, ResumeCheckpoint


class Drawing(L.LightningModule):
    """Draws on each rank as many numbers as it has ranks before it, and one more."""

    def __init__(self, folder: Path, stop: int | None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(16, 1)
        self.folder, self.stop, self.drawn = folder, stop, []

    def on_train_start(self) -> None:
        if self.trainer.global_step == 0:
            torch.manual_seed(100 + self.global_rank)

    def training_step(self, batch, batch_idx):
        drawn = torch.rand(1 + self.global_rank)
        self.drawn.append([self.trainer.global_step, *drawn.tolist()])
        return (self.layer(batch[0].flatten(1)) * drawn.sum()).square().mean()

    def on_train_batch_start(self, batch, batch_idx) -> None:
        if self.trainer.global_step == self.stop:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_fit_end(self) -> None:
        (self.folder / f"rank{self.global_rank}.json").write_text(json.dumps(self.drawn))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, last: Path, stop: int | None = None, ckpt_path: Path | None = None) -> None:
    folder.mkdir(exist_ok=True)
    images = torch.zeros(32, 1, 4, 4, dtype=torch.uint8)
    loader = training_loader(ArrayDataset(images, torch.zeros(32).long()), ShuffleSampler(32, 3), 4)
    checkpoint = ResumeCheckpoint(last, steps=1)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", max_epochs=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[EpochStart(checkpoint), checkpoint],
    )  # fmt: skip
    torch.manual_seed(0)
    trainer.fit(Drawing(folder, stop), loader, ckpt_path=str(ckpt_path) if ckpt_path else None)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    fit(root / "whole", root / "whole.ckpt")
    for stop in (2, 4):  # within the first epoch of four steps, and at its end
        with contextlib.suppress(Exception):
            fit(root / f"stopped{stop}", root / f"{stop}.ckpt", stop)
        fit(root / f"rest{stop}", root / f"{stop}.ckpt", None, root / f"{stop}.ckpt")
