"""A tiny Lightning project, as a user would have it: module-level classes, so that spawned processes find them."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def make_backbone() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())


class Plain(L.LightningModule):
    """self.backbone and self.head; the learning rate is high, so that every step shows."""

    def __init__(self, backbone: nn.Module | None = None, lr: float = 0.05) -> None:
        super().__init__()
        self.backbone = backbone or make_backbone()
        with torch.random.fork_rng():
            torch.manual_seed(8)
            self.head = nn.Linear(8, 2)
        self.lr = lr

    def forward(self, inputs):
        return self.head(self.backbone(inputs))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Validated(Plain):
    """Its validation metric says that the first epoch was the best."""

    def validation_step(self, batch, batch_idx):
        self.log("quality", -float(self.current_epoch), batch_size=len(batch[0]))


class Nested(L.LightningModule):
    """The backbone lies deeper, in `model.encoder`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"encoder": make_backbone(), "head": nn.Linear(8, 2)})

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model["head"](self.model["encoder"](batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Tied(nn.Module):
    """Two layers that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(6)
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.last = nn.Linear(6, 8)
        self.second.weight = self.first.weight

    def forward(self, inputs):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(inputs)))))


class Wrapped(nn.Module):
    """A backbone around a model of another library, whose files name the model's own tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return self.model(inputs)


class SaveWeights(Callback):
    """Writes the weights at the end of a fit, from rank 0, as a plain file to compare with."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_fit_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save({name: value.clone() for name, value in pl_module.state_dict().items()}, self.path)


class SaveResults(Callback):
    """Writes what the callbacks before it found, one file per rank."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_fit_end(self, trainer, pl_module):
        results = {type(each).__name__: each.results for each in trainer.callbacks if hasattr(each, "results")}
        torch.save(results, f"{self.folder}/results-{trainer.global_rank}.pt")


class LeaveTogether(Callback):
    """Ends the process group before the processes end: gloo's threads, if still alive then, abort one now and then."""

    def teardown(self, trainer, pl_module, stage):
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def make_data(feature: int, count: int = 64, seed: int = 0) -> TensorDataset:
    """The label is the sign of one input."""
    inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, (inputs[:, feature] > 0).long())


def make_loader(feature: int, count: int = 64, seed: int = 0, batch_size: int = 16) -> DataLoader:
    return DataLoader(make_data(feature, count, seed), batch_size=batch_size)


def make_trainer(folder, *callbacks: Callback, epochs: int = 2, **arguments) -> L.Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(default_root_dir=folder, max_epochs=epochs, callbacks=list(callbacks), **{**defaults, **arguments})
