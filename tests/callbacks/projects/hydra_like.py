"""A project in the shape of the Hydra templates: the network and the optimizer's factory are hyperparameters."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split


class DigitsModule(L.LightningModule):
    """`self.net` is called by `forward`; it contains its own last layer."""

    def __init__(self, net: nn.Module, optimizer: partial, config: DictConfig, folder: Path) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # including objects, as in the templates
        self.net = net
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.criterion(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/loss", self.criterion(self(x), y))

    def configure_optimizers(self):
        return self.hparams.optimizer(params=self.parameters())


class DigitsData(L.LightningDataModule):
    """Splits its data in `setup`, once, as the templates do."""

    def __init__(self, feature: int) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.data_train = self.data_val = None

    def setup(self, stage: str | None = None) -> None:
        if self.data_train is None:
            generator = torch.Generator().manual_seed(self.hparams.feature)
            x = torch.randn(96, 6, generator=generator)
            data = TensorDataset(x, (x[:, self.hparams.feature] > 0).long())
            self.data_train, self.data_val = random_split(data, [64, 32], generator=generator)

    def train_dataloader(self):
        return DataLoader(self.data_train, batch_size=16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.data_val, batch_size=16)


def make_net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))


def make_module(net: nn.Module) -> DigitsModule:
    config = OmegaConf.create({"optimizer": {"lr": 0.3}, "tags": ["dev"]})
    return DigitsModule(net, partial(torch.optim.SGD, lr=config.optimizer.lr), config, Path("logs"))
