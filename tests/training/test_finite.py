"""A NaN or infinite loss, output or weight ends a fit, and is not saved in a checkpoint."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn

from freemerge.cli import main
from freemerge.errors import NotFiniteError
from freemerge.evaluation import LabelSpace, evaluate
from freemerge.training import FineTuner
from freemerge.training.resume import EpochStart, ResumeCheckpoint
from tests.tiny import TinySuite, tiny_backbone


class FailingAt(nn.Linear):
    """A head whose output is NaN from a given training step on, or in evaluation only."""

    def __init__(self, step: int | None) -> None:
        super().__init__(16, 4)
        self.step, self.seen = step, 0

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.seen += self.training
        failed = not self.training if self.step is None else self.training and self.seen >= self.step
        return super().forward(features) * (float("nan") if failed else 1.0)


class Tuner(FineTuner):
    def __init__(self, step: int | None) -> None:
        self.step = step
        super().__init__(tiny_backbone(), head="linear")

    def make_head(self, num_outputs: int) -> nn.Module:
        return FailingAt(self.step)


def fit(tuner: FineTuner, tmp_path, steps: int | None = 1, **options) -> None:
    last = ResumeCheckpoint(tmp_path / "last.ckpt", steps=steps)
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=[EpochStart(last), last], **options,
    )  # fmt: skip
    trainer.fit(tuner, datamodule=TinySuite()["corners"])


def test_a_nan_loss_ends_the_fit_and_keeps_the_previous_checkpoint(tmp_path) -> None:
    said = "Tuner, task 'corners': the loss is NaN or infinite in epoch 1, at step 6 "  # an epoch has 4 steps
    with pytest.raises(NotFiniteError, match=said):
        fit(Tuner(6), tmp_path, steps=None, num_sanity_val_steps=0)
    with pytest.raises(NotFiniteError, match="Tuner, task 'corners': a weight is NaN or infinite after step 6 "):
        fit(Tuner(6), tmp_path, num_sanity_val_steps=0)  # found when it is about to be saved
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 5
    assert all(tensor.isfinite().all() for tensor in kept["state_dict"].values() if tensor.is_floating_point())


def test_a_nan_output_in_validation_is_an_error(tmp_path) -> None:
    with pytest.raises(
        NotFiniteError, match=r"an output on validation data is NaN or infinite in epoch 0 \(learning rate"
    ):
        fit(Tuner(None), tmp_path, num_sanity_val_steps=0)
    with pytest.raises(NotFiniteError, match=r"before any training: check the base's weights"):
        fit(Tuner(None), tmp_path)


def test_nan_weights_after_the_last_step_are_not_saved(tmp_path) -> None:
    class Breaks(FineTuner):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == 11:  # the last of three epochs
                self.head.weight.grad.fill_(float("nan"))

    with pytest.raises(NotFiniteError, match="a weight is NaN or infinite after step 12"):
        fit(Breaks(tiny_backbone(), head="linear"), tmp_path, limit_val_batches=0)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in kept["state_dict"].values() if tensor.is_floating_point())


def test_an_evaluation_with_nan_outputs_names_the_tasks() -> None:
    loaders = {"a": [(torch.ones(2, 3), torch.zeros(2).long())], "b": [(torch.ones(2, 3), torch.zeros(2).long())]}
    space = LabelSpace({"a": 3, "b": 3})
    ruled_out = torch.tensor([[0.0, float("-inf"), 1.0]]).expand(2, -1)
    assert evaluate(lambda inputs, task: ruled_out, loaders, space) == {"a": 0.0, "b": 0.0}
    with pytest.raises(NotFiniteError, match="outputs for task 'b' are NaN or infinite"):
        evaluate(lambda inputs, task: inputs * (float("nan") if task == "b" else 1.0), loaders, space)


def test_a_diverging_run_ends_with_one_line_that_names_the_stage(tmp_path, capsys) -> None:
    learning_rate = "1.0e30"
    code = main(["fit", "--config", "tests/tiny.yaml", "--run.folder", str(tmp_path / "run"), "--run.stages",
                 "[pretrain]", "--pretrain.optimizer", "SGD", "--pretrain.optimizer.lr", learning_rate])  # fmt: skip
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert said.startswith("error: pretrain: FineTuner, task 'pretraining': ")
    assert "NaN or infinite" in said
    assert "try a lower learning rate" in said
    assert not (tmp_path / "run" / "pretrain" / "stage.json").exists()
