"""Strategies that spawn processes pickle the configured objects."""

import pickle
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule

from freemerge.cli.suite import FreemergeCLI

TINY = Path(__file__).parent.parent / "tiny.yaml"


class Instantiates(FreemergeCLI):
    """The CLI whose `fit` keeps what it would fit."""

    def fit(self, model: LightningModule, datamodule: LightningDataModule, **_: object) -> None:
        self.fitted = model, datamodule


def test_the_configured_model_and_data_can_be_pickled() -> None:
    optimizer = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.25"]
    cli = Instantiates(["fit", "--config", str(TINY), *optimizer])
    model, _ = pickle.loads(pickle.dumps(cli.fitted))
    (group,) = model.optimizer(model.backbone.parameters()).param_groups
    assert group["lr"] == 0.25
    state = cli.fitted[0].state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)
