"""Each callback in a Lightning project of at most 40 lines, stopped and resumed from Lightning's checkpoint."""

import csv
import shutil

import pytest
import torch

from freemerge.checkpoints import load_checkpoint, save_checkpoint

PROJECT = """
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

{imports}


class Project(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 2)
        self.backbone.load_state_dict(torch.load("pretrained.pt"))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3)


inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
data = DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), batch_size=16)
{callback}
callbacks = [callback, ModelCheckpoint(dirpath="checkpoints", save_last=True)]
trainer = L.Trainer(max_epochs=4, accelerator="cpu", callbacks=callbacks, logger=CSVLogger(".", name="logs"))
trainer.fit(Project(), data, data, ckpt_path={ckpt_path})
"""
CALLBACKS = {
    "TaskCheckpoint": 'callback = TaskCheckpoint("task.safetensors", task="mine", overwrite=True)',
    "MergeAtFitEnd": 'callback = MergeAtFitEnd(WeightAverage(), ["other.safetensors"], overwrite=True)',
    "MultiTaskEvaluation": 'callback = MultiTaskEvaluation({"mine": data}, heads={}, every_n_epochs=1)',
    "MergePreview": 'callback = MergePreview(WeightAverage(), "pretrained.pt", ["other.safetensors"], {"mine": data})\n'
    "Project.forward = lambda self, inputs: self.head(self.backbone(inputs))",
}


class Stop(Exception):
    pass


def stop(module):
    if module.current_epoch == 2:
        raise Stop


def run(name, ckpt_path=None, **found):
    torch.manual_seed(1)
    method = "from freemerge.merging import WeightAverage\n" if "WeightAverage" in CALLBACKS[name] else ""
    script = PROJECT.format(
        imports=f"{method}from freemerge_callbacks import {name}",
        callback=CALLBACKS[name],
        ckpt_path=repr(ckpt_path),
    ).strip()
    assert len(script.splitlines()) <= 40
    if "stop" in found:
        script = script.replace("\n\n\ninputs", "\n    on_train_epoch_start = stop\n\n\ninputs")
    exec(script, found)
    return found["callback"], found["trainer"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    start = torch.nn.Sequential(torch.nn.Linear(4, 8)).state_dict()
    torch.save(start, "pretrained.pt")
    save_checkpoint("other.safetensors", {name: value + 0.1 for name, value in start.items()})
    return tmp_path


def logged(trainer, column):
    with open(f"{trainer.logger.log_dir}/metrics.csv") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]


@pytest.mark.parametrize("name", CALLBACKS)
def test_in_a_plain_project_stopped_and_resumed(folder, name):
    """Two epochs and two more from the checkpoint give the same result as four."""
    whole, _ = run(name)
    wanted = {path.name: load_checkpoint(path) for path in folder.glob("*.safetensors")}
    shutil.rmtree("checkpoints")
    with pytest.raises(Stop):
        run(name, stop=stop)
    resumed, trainer = run(name, "checkpoints/last.ckpt")
    if name in ("TaskCheckpoint", "MergeAtFitEnd"):
        path = whole.saved_path if name == "TaskCheckpoint" else whole.merged_path
        again = load_checkpoint(path)
        assert all(torch.equal(again[key], value) for key, value in wanted[path.name].items())
        if name == "MergeAtFitEnd":
            assert logged(trainer, "merge/models") == [2.0]
            assert resumed.report["hash"] == whole.report["hash"]
    else:
        prefix, evaluations = ("multitask", 3) if name == "MultiTaskEvaluation" else ("merged", 2)
        accuracies = logged(trainer, f"{prefix}/mine/acc")
        assert len(accuracies) == evaluations  # after the third and the fourth epoch, and of the whole fit
        assert accuracies[-1] == pytest.approx(whole.results["mine"])
        assert resumed.results == whole.results
