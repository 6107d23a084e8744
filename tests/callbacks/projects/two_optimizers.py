"""Manual optimization with two optimizers, one for the backbone and one for the head."""

from __future__ import annotations

import lightning as L
import torch
from torch import nn

from tests.callbacks.callbacks_project import make_backbone


class TwoOptimizers(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.backbone, self.head = make_backbone(), nn.Linear(8, 2)

    def forward(self, inputs):
        return self.head(self.backbone(inputs))

    def training_step(self, batch, batch_idx):
        of_backbone, of_head = self.optimizers()
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        of_backbone.zero_grad()
        of_head.zero_grad()
        self.manual_backward(loss)
        of_head.step()
        if batch_idx % 2:  # the backbone is updated with every second batch
            of_backbone.step()

    def validation_step(self, batch, batch_idx):
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.backbone.parameters(), lr=0.1), torch.optim.SGD(self.head.parameters(), lr=0.3)
