"""Resuming in the middle of a fit: loaders, schedulers, early stopping, and checkpoints that are files or folders."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from freemerge.data import ArrayDataset
from freemerge.data.augment import RandomAffine
from freemerge.data.loaders import ShuffleSampler, training_loader
from freemerge.data.resumable import random_state, set_random_state
from freemerge.training.resume import BestCheckpoint, EpochStart, ResumeCheckpoint, _replace


def loader(workers: int = 0):
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    data = ArrayDataset(images, torch.arange(40), augment=RandomAffine(shift=0.3))
    return training_loader(data, ShuffleSampler(40, 3), 8, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_gives_the_same_batches_and_random_numbers(workers: int) -> None:
    torch.manual_seed(0)
    whole = loader(workers)
    seen = []
    for index, batch in enumerate(whole):
        seen.append((batch, torch.rand(3)))
        if index == 1:
            state = whole.state_dict()
    torch.manual_seed(5)
    rest = loader(workers)
    rest.load_state_dict(state)
    again = [(batch, torch.rand(3)) for batch in rest]
    assert len(again) == 3
    for (batch, drawn), (expected, expected_drawn) in zip(again, seen[2:], strict=True):
        assert torch.equal(batch[0], expected[0])
        assert torch.equal(batch[1], expected[1])
        assert torch.equal(drawn, expected_drawn)


def test_the_state_of_all_random_generators_is_restored() -> None:
    import random

    import numpy as np

    state = random_state()
    drawn = [random.random(), np.random.rand(), float(torch.rand(()))]  # noqa: NPY002
    set_random_state(state)
    assert drawn == [random.random(), np.random.rand(), float(torch.rand(()))]  # noqa: NPY002


class Noisy(L.LightningModule):
    """Draws random numbers in training; its schedule is ReduceLROnPlateau."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(16, 1)

    def training_step(self, batch, batch_idx):
        inputs = batch[0].flatten(1)
        return (self.layer(inputs + torch.rand_like(inputs)) - batch[1][:, None]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", 1.0)  # constant: a plateau from the start

    def configure_optimizers(self):
        assert (
            self.trainer.estimated_stepping_batches > 0
        )  # reading it sets up the loaders before a checkpoint is loaded
        adam = torch.optim.Adam(self.parameters(), lr=0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, patience=0, factor=0.5)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss"}}


class Killed(Exception):
    pass


class Kill(L.Callback):
    def __init__(self, epoch: int, batch: int | None) -> None:
        self.epoch, self.batch = epoch, batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            raise Killed

    def on_validation_start(self, trainer, pl_module):
        if self.batch is None and trainer.current_epoch == self.epoch and not trainer.sanity_checking:
            raise Killed


def fit(folder, kill=None, resume=False, callbacks=(), **options) -> L.Trainer:
    torch.manual_seed(0)
    last = ResumeCheckpoint(folder / "last.ckpt", steps=2)
    best = BestCheckpoint(dirpath=folder, filename="best", monitor="val/loss")
    trainer = L.Trainer(
        max_epochs=4, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        callbacks=[EpochStart(last), *callbacks, *([kill] if kill else []), best, last], **options,
    )  # fmt: skip
    with contextlib.suppress(Killed):
        trainer.fit(Noisy(), loader(), loader(), ckpt_path=str(folder / "last.ckpt") if resume else None)
    return trainer


def state(folder) -> dict:
    return torch.load(folder / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"val_check_interval": 2}])
@pytest.mark.parametrize(("epoch", "batch"), [(0, 3), (1, 0), (2, 1), (2, None), (3, 4)])
def test_a_resumed_fit_ends_with_the_same_weights(tmp_path, epoch: int, batch: int | None, options) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = fit(tmp_path / "whole", **options)
    fit(tmp_path / "killed", Kill(epoch, batch), **options)
    moved = (tmp_path / "killed").rename(tmp_path / "moved")
    again = fit(moved, resume=True, **options)
    assert (again.current_epoch, again.global_step) == (whole.current_epoch, whole.global_step)
    one, other = state(tmp_path / "whole"), state(moved)
    for name, weights in one["state_dict"].items():
        assert torch.equal(weights, other["state_dict"][name])
    assert one["lr_schedulers"] == other["lr_schedulers"]
    assert one["callbacks"]["ResumeCheckpoint"]["metrics"] == other["callbacks"]["ResumeCheckpoint"]["metrics"]
    assert again.checkpoint_callback.best_model_path == str(moved / "best.ckpt")


def test_the_last_checkpoint_is_written_without_an_improvement(tmp_path) -> None:
    fit(tmp_path, Kill(3, 1))
    assert state(tmp_path)["epoch"] == 3


def test_a_fit_that_stopped_early_stays_stopped(tmp_path) -> None:
    stopped = fit(tmp_path, callbacks=[EarlyStopping("val/loss", patience=1)])
    again = fit(tmp_path, resume=True, callbacks=[EarlyStopping("val/loss", patience=1)])
    assert again.global_step == stopped.global_step < 20


def test_a_sharded_checkpoint_replaces_the_previous_one(tmp_path) -> None:
    for text in ("one", "two"):
        (tmp_path / "draft").mkdir()
        (tmp_path / "draft" / "shard").write_text(text)
        _replace(tmp_path / "draft", tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt" / "shard").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_each_rank_resumes_with_its_own_random_numbers(tmp_path) -> None:
    """Two processes, three fits. With torch 2.8 they cannot be forked from a process that was forked itself."""
    command = [sys.executable, Path(__file__).with_name("two_ranks.py"), tmp_path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for stop in (2, 4):
        for rank in (0, 1):
            whole, rest = (json.loads((tmp_path / name / f"rank{rank}.json").read_text())
                           for name in ("whole", f"rest{stop}"))  # fmt: skip
            assert rest == whole[stop:]
            assert len(whole) == 8
