"""The small Lightning project that `check_gpu.py` fits: at module level, so that spawned processes find it."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

SIZES = {"a": 53, "b": 5}  # validation samples of each task; neither divides by two ranks
INPUTS, WIDTH = 32, 128


def make_backbone() -> nn.Sequential:
    """The same base every time; its batch-norm buffers differ between DDP's ranks when a fit ends."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


def make_finetuned() -> dict[str, Tensor]:
    """Another task's weights."""
    generator = torch.Generator().manual_seed(2)
    start = make_backbone().state_dict()
    return {
        name: value + 0.05 * torch.rand(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in start.items()
    }


def make_heads() -> dict[str, nn.Module]:
    """A head for each task."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return {"a": nn.Linear(WIDTH, 2), "b": nn.Linear(WIDTH, 3)}


def make_loader(size: int, classes: int = 2) -> DataLoader:
    """The class depends on the sum of the inputs."""
    inputs = torch.randn(size, INPUTS, generator=torch.Generator().manual_seed(size))
    labels = (inputs.sum(1) * classes / 6 + classes / 2).long().clamp(0, classes - 1)
    return DataLoader(TensorDataset(inputs, labels), batch_size=8)


def make_loaders() -> dict[str, DataLoader]:
    """Validation data of both tasks."""
    return {"a": make_loader(SIZES["a"]), "b": make_loader(SIZES["b"], 3)}


class Small(L.LightningModule):
    """A backbone and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = make_backbone()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.head = nn.Linear(WIDTH, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.backbone(inputs))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("age", float(self.current_epoch), batch_size=len(batch[0]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Sharded(Small):
    """The same under ModelParallelStrategy: each linear layer's weights are divided among the ranks (FSDP2)."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for layer in (self.backbone[0], self.backbone[3], self.head):
            fully_shard(layer, mesh=mesh)
        fully_shard(self.backbone, mesh=mesh)


class DriftApart(Callback):
    """Makes the ranks' batch-norm statistics differ, as after a fit that ends with a training step."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with torch.no_grad():
            for buffer in pl_module.backbone.buffers():
                buffer.add_(trainer.global_rank)


class SaveWeights(Callback):
    """Writes the backbone's weights at the end of a fit, gathered on rank 0, for comparison."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = get_model_state_dict(trainer.strategy.model, options=options)
        else:
            state = pl_module.state_dict()
        if trainer.is_global_zero:
            start = "backbone."
            weights = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
            torch.save({name: value.detach().cpu().clone() for name, value in weights.items()}, self.path)


class SaveResults(Callback):
    """Writes the results of the preceding callbacks, from each rank."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = {type(each).__name__: each.results for each in trainer.callbacks if hasattr(each, "results")}
        found["ranks"] = next(each.report["ranks"] for each in trainer.callbacks if hasattr(each, "report"))
        torch.save(found, f"{self.path}.{trainer.global_rank}")


class LeaveTogether(Callback):
    """Ends the process group before the processes end, because running gloo threads sometimes abort a process."""

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
