"""A suite and a backbone so small that a whole run takes seconds: real classes, real training, tiny sizes."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import ClassVar

import torch

from freemerge.data import ArrayDataset, Task, TaskSuite
from freemerge.models import TransformersBackbone

VIT = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
}

BERT = {
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}


def tiny_backbone(seed: int = 0) -> TransformersBackbone:
    """A ViT of about 5 000 parameters for 8×8 grey images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TransformersBackbone(config=VIT, pooling="mean")


def tiny_text_backbone() -> TransformersBackbone:
    """A BERT of width 16 for texts of up to 32 tokens, of 50 different ones."""
    return TransformersBackbone(config=BERT, pooling="mean")


class TinySuite(TaskSuite):
    """Two tasks on 8×8 images that a glance tells apart: bright corners on black, dark bars on white.

    Args:
        tasks: which tasks.
        batch_size: training batch size.
        eval_batch_size: evaluation batch size.
        num_workers: loader workers.
        seed: seed of the data.
    """

    TASKS: ClassVar[tuple[str, ...]] = ("corners", "bars")

    def __init__(
        self,
        tasks: list[str] | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(tasks, batch_size, eval_batch_size, num_workers, seed)

    def build(self, name: str) -> Task:
        make = {"corners": _corners, "bars": _bars}[name]
        names = {"corners": ("tl", "tr", "bl", "br"), "bars": ("flat", "upright")}[name]
        parts = []
        for index, size in enumerate((64, 37, 45)):
            generator = torch.Generator().manual_seed(1000 * self.seed + 10 * self.TASKS.index(name) + index)
            labels = torch.randint(len(names), (size,), generator=generator)
            parts.append(ArrayDataset(make(labels, generator), labels, mean=0.5, std=0.5))
        return Task(name, names, *parts)

    def pretraining(self) -> Task:
        return self.build("corners")


class NamesSuite(TinySuite):
    """The same two tasks under names with a meaning in Python, torch or state dicts, and non-ASCII names."""

    TASKS: ClassVar[tuple[str, ...]] = ("type", "v1.0 ü")

    def build(self, name: str) -> Task:
        like = TinySuite.TASKS[self.TASKS.index(name)]
        return replace(TinySuite(seed=self.seed).build(like), name=name)

    def pretraining(self) -> Task:
        return self.build("type")


class OddNamesSuite(NamesSuite):
    """The same two tasks under names that look like markup, a format, a number or an option."""

    TASKS: ClassVar[tuple[str, ...]] = ("[bold] 'a': {b}", "--1.5%s")

    def pretraining(self) -> Task:
        return self.build(self.TASKS[0])


class SlowSuite(TinySuite):
    """The same suite with validation slowed to half a second, so that a second process can join a search."""

    def val_dataloader(self):
        return {task: _Slow(loader) for task, loader in super().val_dataloader().items()}


class _Slow:
    def __init__(self, loader) -> None:
        self.loader = loader

    def __iter__(self):
        time.sleep(0.25)
        return iter(self.loader)


def _corners(labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    images = torch.randint(0, 90, (len(labels), 1, 8, 8), generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[0, row : row + 4, column : column + 4] += 100
    return images.to(torch.uint8)


def _bars(labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    images = 255 - torch.randint(0, 90, (len(labels), 1, 8, 8), generator=generator)
    places = torch.randint(8, (len(labels),), generator=generator)
    for image, label, place in zip(images, labels.tolist(), places.tolist(), strict=True):
        line = image[0, place] if label == 0 else image[0, :, place]
        line -= 150
    return images.to(torch.uint8)
