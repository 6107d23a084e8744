"""Write distributed checkpoints from two processes, as users do: `python write_distributed.py FOLDER`.

Lightning's ModelParallelStrategy starts the second process. Beside each checkpoint lies the whole state dict that it
stands for, as a `.pt` file.
"""

import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.data import DataLoader

FOLDER = Path(sys.argv[1])


class Module(LightningModule):
    """A backbone and a head, sharded over the processes (FSDP2)."""

    def configure_model(self) -> None:
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
        self.head = nn.Linear(3, 2)
        fully_shard(self.backbone, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.head, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.head(self.backbone(batch)).square().sum()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)

    def on_train_end(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        generator = torch.Generator().manual_seed(1)
        whole = {
            "rows": torch.randn(7, 4, generator=generator),
            "columns": torch.randn(3, 5, 2, generator=generator).bfloat16(),
            "vector": torch.randn(3, generator=generator),
            "copies": torch.randn(2, 2, generator=generator),
        }
        placements = {"rows": Shard(0), "columns": Shard(1), "vector": Shard(0), "copies": Replicate()}
        state = {name: distribute_tensor(value, mesh, [placements[name]]) for name, value in whole.items()}
        plain = {
            "transposed": torch.randn(4, 3, generator=generator).T,
            "scalar": torch.tensor(3),
            "empty": torch.ones(0, 2),
        }
        dcp.save(state | plain, checkpoint_id=FOLDER / "plain")
        if self.global_rank == 0:
            torch.save(whole | plain, FOLDER / "plain.pt")


if __name__ == "__main__":
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = Trainer(
        strategy=strategy, accelerator="cpu", devices=2, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(torch.randn(8, 5), batch_size=4))
    trainer.save_checkpoint(FOLDER / "lightning.ckpt")
    state = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in trainer.lightning_module.state_dict().items()
    }
    if trainer.global_rank == 0:
        torch.save(state, FOLDER / "lightning.pt")
