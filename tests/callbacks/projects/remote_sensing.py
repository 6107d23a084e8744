"""Projects in the shape of remote-sensing libraries: batches are dicts with more than images and labels."""

from __future__ import annotations

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Scenes(Dataset):
    """Samples {"image", "label", "mask", "filename", "bounds"}.

    Args:
        channel: whose sign is the label, and pixel by pixel the mask.
        count: of samples.
    """

    def __init__(self, channel: int, count: int = 24) -> None:
        generator = torch.Generator().manual_seed(channel)
        shift = torch.randint(0, 2, (count, 1, 1), generator=generator) * 2.0 - 1
        self.images = torch.randn(count, 3, 8, 8, generator=generator)
        self.images[:, channel] += shift
        self.channel = channel

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        mask = (image[self.channel] > 0).long()
        label = (image[self.channel].mean() > 0).long()[None]  # (1,), so that batches have labels (B, 1)
        return {"image": image, "label": label, "mask": mask, "filename": f"{index}.tif", "bounds": (0.0, float(index))}


class SceneData(L.LightningDataModule):
    def __init__(self, channel: int) -> None:
        super().__init__()
        self.channel = channel

    def train_dataloader(self):
        return DataLoader(Scenes(self.channel), batch_size=8)

    def val_dataloader(self):
        return DataLoader(Scenes(self.channel), batch_size=8)


def make_encoder() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh())


class ClassificationTask(L.LightningModule):
    """Scene classification with one logit."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1))

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def training_step(self, batch, batch_idx):
        return nn.functional.binary_cross_entropy_with_logits(self(batch["image"]), batch["label"].float())

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=len(batch["image"]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


class SegmentationTask(ClassificationTask):
    """Semantic segmentation: logits (B, C, H, W) in a dict, as torchvision's models return them."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__(encoder)
        self.decoder = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return {"out": self.decoder(self.encoder(x))}

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch["image"])["out"], batch["mask"])
