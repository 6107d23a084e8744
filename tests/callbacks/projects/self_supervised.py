"""A project in the shape of self-supervised libraries: two views of an image, no labels, and file names."""

from __future__ import annotations

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tests.callbacks.callbacks_project import make_backbone


class Views(Dataset):
    """Samples ((first view, second view), 0, file name)."""

    def __init__(self, count: int = 32) -> None:
        self.inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return (self.inputs[index] + 0.1, self.inputs[index] - 0.1), 0, f"{index}.png"


class Labelled(Dataset):
    """Samples (input, class, file name), for a linear evaluation."""

    def __init__(self, feature: int, count: int = 32) -> None:
        self.inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
        self.labels = (self.inputs[:, feature] > 0).long()

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index], self.labels[index], f"{index}.png"


def loader(feature: int) -> DataLoader:
    return DataLoader(Labelled(feature), batch_size=8)


class SelfSupervised(L.LightningModule):
    """Contrastive learning: two views of an input have similar projections, different from those of other inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.projection_head = make_backbone(), nn.Linear(8, 4)

    def training_step(self, batch, batch_idx):
        (first, second), _, _ = batch
        a, b = (nn.functional.normalize(self.projection_head(self.backbone(view)), dim=1) for view in (first, second))
        return nn.functional.cross_entropy(a @ b.T / 0.1, torch.arange(len(a)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
