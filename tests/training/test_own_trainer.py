"""FineTuner and the data of one task in a user's own Trainer and LightningCLI."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn

from freemerge.data import SuiteTask
from freemerge.models import ModuleBackbone, TransformersBackbone
from freemerge.training import FineTuner
from tests.tiny import TinySuite

VIT = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 8, "patch_size": 4, "num_channels": 1,
}  # fmt: skip


def make_trainer(folder: Path, **arguments) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(accelerator="cpu", devices=1, max_epochs=1, default_root_dir=folder, **quiet, **arguments)


# Two names for each of two layers: transformers renamed them after 5.0.
LORA = {"kind": "lora", "r": 2, "target_modules": ["q_proj", "v_proj", "query", "value"]}


@pytest.mark.parametrize("peft", [None, LORA])
def test_a_task_of_a_suite_is_fitted_tested_and_predicted(tmp_path: Path, peft: dict | None) -> None:
    suite = TinySuite()
    tuner = FineTuner(TransformersBackbone(config=VIT), peft=peft)
    trainer = make_trainer(tmp_path)
    trainer.fit(tuner, datamodule=suite["corners"])
    assert tuner.head.weight.shape == (4, 16)  # the four classes of the task, which come from the data module
    (tested,) = trainer.test(tuner, datamodule=suite["corners"], verbose=False)
    logits = torch.cat(trainer.predict(tuner, datamodule=suite["corners"]))
    labels = torch.stack([label for _, label in suite.task("corners").test])
    assert logits.shape == (45, 4)
    assert tested["test/acc"] == pytest.approx(float((logits.argmax(dim=1) == labels).float().mean()))

    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = FineTuner.load_from_checkpoint(tmp_path / "a.ckpt", backbone=TransformersBackbone(config=VIT)).eval()
    assert (again.hparams["head"], again.hparams["peft"]) == ("probe", peft)
    images = torch.stack([image for image, _ in suite.task("corners").test])
    with torch.no_grad():
        assert torch.equal(again(images), tuner.eval()(images))
    (retested,) = make_trainer(tmp_path).test(again, datamodule=suite["corners"], verbose=False)
    assert retested == tested


def test_inputs_without_labels_are_predicted(tmp_path: Path) -> None:
    tuner = FineTuner(ModuleBackbone(nn.Flatten(), feature_dim=64), num_classes=3)
    images = torch.randn(5, 1, 8, 8)
    (logits,) = make_trainer(tmp_path).predict(tuner, torch.utils.data.DataLoader(images, batch_size=5))
    assert torch.equal(logits, tuner(images))


def test_a_fit_without_a_task_is_refused(tmp_path: Path) -> None:
    tuner = FineTuner(ModuleBackbone(nn.Flatten(), feature_dim=64))
    loader = torch.utils.data.DataLoader(torch.randn(5, 1, 8, 8))
    with pytest.raises(ValueError, match=r'pass `num_classes`, or the data of one task: datamodule=suite\["birds"\]'):
        make_trainer(tmp_path).fit(tuner, loader)


class Foreign(L.LightningModule):
    """A user's module that does not depend on freemerge."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(64, width)
        self.seen = 0

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.seen += len(labels)
        return nn.functional.cross_entropy(self.linear(images.flatten(1)), labels)

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        return self.linear(batch[0].flatten(1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("by_class_path", [False, True])
def test_a_users_lightning_cli_takes_the_data_module(tmp_path: Path, by_class_path: bool) -> None:
    path = {"--data": "freemerge.data.SuiteTask"} if by_class_path else {}
    options = path | {
        "--data.suite": "tests.tiny.TinySuite", "--data.suite.batch_size": "16", "--data.name": "bars",
        "--trainer.accelerator": "cpu", "--trainer.max_epochs": "1", "--trainer.logger": "false",
        "--trainer.enable_progress_bar": "false", "--trainer.enable_model_summary": "false",
        "--trainer.enable_checkpointing": "false", "--trainer.default_root_dir": str(tmp_path),
    }  # fmt: skip
    arguments = ["fit", *(f"{key}={value}" for key, value in options.items())]
    data = L.LightningDataModule if by_class_path else SuiteTask
    cli = LightningCLI(Foreign, data, subclass_mode_data=by_class_path, save_config_callback=None, args=arguments)
    assert type(cli.datamodule) is SuiteTask
    assert (
        cli.model.seen == 64 + 2 * 37
    )  # the training samples, and the validation samples twice: in the sanity check and in the epoch
    assert torch.cat(cli.trainer.predict(cli.model, cli.datamodule)).shape == (45, 4)
