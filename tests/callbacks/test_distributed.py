"""Two processes: the same file, bit for bit, and exact accuracies."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader

from freemerge.checkpoints import hash_tensors, load_checkpoint, save_checkpoint
from freemerge.checkpoints.formats.task_files import read_record
from freemerge.merging import FRMerging, merge
from freemerge_callbacks import MergeAtFitEnd, MergePreview, MultiTaskEvaluation, TaskCheckpoint
from freemerge_callbacks._predicting import check_loaders
from freemerge_callbacks._ranks import on_rank_zero
from tests import processes
from tests.callbacks.callbacks_project import (
    LeaveTogether,
    SaveResults,
    SaveWeights,
    Validated,
    make_backbone,
    make_loader,
    make_trainer,
)

ROOT = Path(__file__).parents[2]


def test_two_processes_write_the_same_file_as_one(tmp_path, other):
    torch.manual_seed(1)
    processes.forkserver()  # what Lightning starts begins with the large packages imported
    heads = {"a": nn.Linear(8, 2), "b": nn.Linear(8, 3)}
    loaders = {"a": make_loader(0, 53, seed=4, batch_size=8), "b": make_loader(1, 5, seed=5, batch_size=8)}
    save_checkpoint(tmp_path / "base.safetensors", make_backbone().state_dict())
    callbacks = [
        MergePreview(FRMerging(), str(tmp_path / "base.safetensors"), [str(other)], loaders, heads=heads),
        TaskCheckpoint(str(tmp_path / "task.safetensors"), task="a"),
        MergeAtFitEnd(FRMerging(), [str(other)], str(tmp_path / "two.safetensors")),
        MultiTaskEvaluation(loaders, heads=heads, every_n_epochs=1),
        SaveWeights(str(tmp_path / "trained.pt")),
        SaveResults(str(tmp_path)),
        LeaveTogether(),
    ]
    trainer = make_trainer(tmp_path, *callbacks, strategy=DDPStrategy(start_method="forkserver"), devices=2, epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Validated(), make_loader(0), make_loader(0))

    trained = torch.load(tmp_path / "trained.pt", weights_only=True)
    base = make_backbone().state_dict()
    own = {name: trained[f"backbone.{name}"] for name in base}
    assert not torch.equal(own["0.weight"], base["0.weight"])
    merge(base, {"own": own, "other": other}, FRMerging(), output=tmp_path / "one.safetensors")
    assert read_record(tmp_path / "task.safetensors").base_hash == hash_tensors(base)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()

    backbone = make_backbone()
    backbone.load_state_dict(load_checkpoint(tmp_path / "two.safetensors"))
    for rank in range(2):
        results = torch.load(tmp_path / f"results-{rank}.pt", weights_only=True)
        for task, loader in loaders.items():
            right = sum(int((heads[task](backbone(x)).argmax(1) == y).sum()) for x, y in loader)
            for found in (
                results["MultiTaskEvaluation"],
                results["MergePreview"],
            ):  # the last step belongs to the last epoch
                torch.testing.assert_close(found[task], right / len(loader.dataset), rtol=0, atol=1e-6)


def test_the_tool_that_checks_every_strategy():
    """ddp and ModelParallelStrategy start their second process as a command, with all its imports.

    Each fit's merge is shared by both ranks, and its file compared with that of one process with the same weights.
    """
    only = ["cpu-ddp", "cpu-model-parallel", "gpu-merge"]
    done = processes.run(ROOT / "tools" / "check_gpu.py", "--only", *only, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if "×" in line or "cuda" in line]
    cpu = [row for row in rows if "cuda" not in row]
    assert len(cpu) == 6 + 5
    assert all("ok" in row for row in cpu)
    if not torch.cuda.is_available():
        assert [" ".join(row[-3:]) for row in rows if "cuda" in row] == ["skipped: no GPU"]


def test_an_error_on_rank_zero_is_raised_on_all_ranks():
    """Not tested with processes, because a process that waits for the other would wait for half an hour."""

    def fail():
        raise OSError("disk full")

    sent = []
    strategy = SimpleNamespace(broadcast=lambda value: sent.append(value) or value)
    with pytest.raises(OSError, match="disk full"):
        on_rank_zero(SimpleNamespace(is_global_zero=True, strategy=strategy), fail)
    strategy.broadcast = lambda value: sent[0]
    with pytest.raises(RuntimeError, match="rank 0 failed with OSError: disk full"):
        on_rank_zero(SimpleNamespace(is_global_zero=False, strategy=strategy), fail)


def test_loaders_that_ranks_cannot_divide_are_refused():
    trainer = SimpleNamespace(strategy=None, world_size=2)
    shuffled = DataLoader(make_loader(0).dataset, batch_size=8, shuffle=True)
    with pytest.raises(
        ValueError, match="the loader of 'b' shuffles, in another order on every rank; use shuffle=False"
    ):
        check_loaders(trainer, {"a": make_loader(0), "b": shuffled}, "Somebody")
    trainer.world_size = 1
    check_loaders(trainer, {"b": shuffled}, "Somebody")
    trainer.strategy = ModelParallelStrategy()
    with pytest.raises(ValueError, match="ModelParallelStrategy shards the module"):
        check_loaders(trainer, {"a": make_loader(0)}, "Somebody")
