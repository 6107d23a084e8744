"""A project in the shape of Lightning's GLUE tutorial: a transformers model that gets a whole batch of tokens."""

from __future__ import annotations

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, BertModel

CONFIG = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def sentences(token: int, count: int = 24) -> list[dict[str, torch.Tensor]]:
    """The label says whether a sentence begins with tokens above `token`."""
    generator = torch.Generator().manual_seed(token)
    ids = torch.randint(2, 32, (count, 6), generator=generator)
    return [
        {"input_ids": row, "attention_mask": torch.ones(6, dtype=torch.long), "labels": (row[0] > token).long()}
        for row in ids
    ]


def loader(token: int) -> DataLoader:
    return DataLoader(sentences(token), batch_size=8)


class GLUETransformer(L.LightningModule):
    """The transformers model contains encoder and head."""

    def __init__(self, model: BertForSequenceClassification | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.model = model or BertForSequenceClassification(BertConfig(**CONFIG))

    def forward(self, **inputs):
        return self.model(**inputs)

    def training_step(self, batch, batch_idx):
        return self(**batch)[0]

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self(**batch)[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Encoder(L.LightningModule):
    """A transformers encoder, whose output is a `ModelOutput`, and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.backbone = BertModel(BertConfig(**CONFIG))
            self.head = torch.nn.Linear(16, 2)

    def training_step(self, batch, batch_idx):
        features = self.backbone(batch["input_ids"], batch["attention_mask"]).pooler_output
        return torch.nn.functional.cross_entropy(self.head(features), batch["labels"])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)
