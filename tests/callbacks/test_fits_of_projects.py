"""Fits that change the working folder, run a Lightning tuner first, or save only their trained tensors."""

import os

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader

from freemerge.checkpoints import load_checkpoint, save_checkpoint
from freemerge.merging import TaskArithmetic, WeightAverage
from freemerge_callbacks import MergeAtFitEnd, MergePreview, MultiTaskEvaluation, TaskCheckpoint
from tests.callbacks.callbacks_project import Validated, make_backbone, make_data, make_loader, make_trainer


@pytest.fixture
def other(tmp_path):
    """Another task's model, and its tensors."""
    tensors = {name: value + 0.1 for name, value in make_backbone().state_dict().items()}
    save_checkpoint(tmp_path / "other.safetensors", tensors)
    return tensors


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def mean(module, other):
    return {name: (value + other[name]) / 2 for name, value in module.backbone.state_dict().items()}


def test_relative_paths_start_from_the_folder_at_construction(tmp_path, monkeypatch, other):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    save_checkpoint("base.safetensors", make_backbone().state_dict())
    merge = MergeAtFitEnd(WeightAverage(), ["other.safe*"], "m.safetensors")
    keep = TaskCheckpoint("t.safetensors", "a", save="task_vector")
    preview = MergePreview(WeightAverage(), "base.safetensors", ["other.safetensors"], {"a": make_loader(0)})
    written = MultiTaskEvaluation({"a": make_loader(0)}, merged="m.safetensors")

    class Moves(Validated):
        def on_train_epoch_start(self):
            os.chdir(tmp_path / "elsewhere")

    module = Moves()
    trainer = make_trainer(tmp_path, merge, keep, preview, written)
    trainer.fit(module, make_loader(0), make_loader(0))
    assert_close(load_checkpoint(tmp_path / "m.safetensors"), mean(module, other))
    assert merge.merged_path == tmp_path / "m.safetensors"
    assert [entry["name"] for entry in merge.report["finetuned"]][1:] == ["other.safetensors"]
    assert (tmp_path / "t.safetensors").exists()
    assert not list((tmp_path / "elsewhere").iterdir())
    assert not list(tmp_path.glob(".*.safetensors"))


def test_a_resumed_fit_finds_its_state_in_another_folder(tmp_path, monkeypatch):
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        if folder == "old":
            first = TaskCheckpoint("t.safetensors", "a")
        else:
            assert TaskCheckpoint("t.safetensors", "a").state_key == first.state_key


@pytest.mark.parametrize("tunes", ["Tuner", "LearningRateFinder", "BatchSizeFinder"])
def test_a_fit_after_a_lightning_tuner_is_not_a_resumed_fit(tmp_path, other, tunes):
    class Tunable(Validated):
        batch_size = 4

        def train_dataloader(self):
            return DataLoader(make_data(0), self.batch_size)

    module = Tunable()
    start = {name: value.clone() for name, value in module.backbone.state_dict().items()}
    merge = MergeAtFitEnd(TaskArithmetic(0.5), [str(tmp_path / "other.safetensors")], str(tmp_path / "m.safetensors"))
    finder = {
        "LearningRateFinder": lambda: LearningRateFinder(num_training_steps=8),
        "BatchSizeFinder": lambda: BatchSizeFinder(steps_per_trial=1, max_trials=1),
    }
    callbacks = [merge, *([finder[tunes]()] if tunes in finder else [])]
    trainer = make_trainer(tmp_path, *callbacks, enable_checkpointing=True)
    if tunes == "Tuner":
        Tuner(trainer).lr_find(module, num_training=8)
    trainer.fit(module, val_dataloaders=make_loader(0))
    own = module.backbone.state_dict()
    expected = {name: base + 0.5 * (own[name] - base + other[name] - base) for name, base in start.items()}
    assert_close(load_checkpoint(tmp_path / "m.safetensors"), expected)


class SavesWhatItTrains(Validated):
    """A checkpoint without frozen tensors, as projects with a large frozen part save it."""

    def __init__(self, also=()):
        super().__init__()
        self.strict_loading = False
        self.backbone[0].requires_grad_(False)
        self.left_out = {"backbone.0.weight", "backbone.0.bias", *also}

    def on_save_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if name not in self.left_out}


def test_the_best_checkpoint_can_have_only_trained_tensors(tmp_path, other):
    module = SavesWhatItTrains()
    best = ModelCheckpoint(tmp_path / "checkpoints", monitor="quality", mode="max")
    others = [str(tmp_path / "other.safetensors")]
    merge = MergeAtFitEnd(WeightAverage(), others, str(tmp_path / "m.safetensors"), weights="best")
    keep = TaskCheckpoint(str(tmp_path / "t.safetensors"), "a", weights="best")
    make_trainer(tmp_path, merge, keep, best, enable_checkpointing=True).fit(module, make_loader(0), make_loader(0))
    saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    state = {**module.state_dict(), **saved}
    assert not torch.equal(state["backbone.2.weight"], module.backbone[2].weight)  # an earlier epoch's
    expected = {name: (state[f"backbone.{name}"] + value) / 2 for name, value in other.items()}
    assert_close(load_checkpoint(tmp_path / "m.safetensors"), expected)
    assert_close(load_checkpoint(tmp_path / "t.safetensors"), state)
    assert not list(tmp_path.glob(".*.safetensors"))


@pytest.mark.parametrize("kind", ["merge", "task"])
def test_a_best_checkpoint_without_a_trained_tensor_is_refused(tmp_path, other, kind):
    module = SavesWhatItTrains(also=["backbone.2.weight"])
    best = ModelCheckpoint(tmp_path / "checkpoints", monitor="quality", mode="max")
    output, others = str(tmp_path / "out.safetensors"), [str(tmp_path / "other.safetensors")]
    callback = (
        MergeAtFitEnd(WeightAverage(), others, output, weights="best")
        if kind == "merge"
        else TaskCheckpoint(output, "a", weights="best")
    )
    with pytest.raises(
        ValueError, match=r"\.ckpt leaves out 'backbone.2.weight', which was trained; keep it in on_save"
    ):
        make_trainer(tmp_path, callback, best, enable_checkpointing=True).fit(module, make_loader(0), make_loader(0))
    assert not (tmp_path / "out.safetensors").exists()


def test_the_base_can_be_a_checkpoint_of_the_whole_module(tmp_path, other):
    """What a pretraining with the same LightningModule leaves: `backbone.*` and the head, and the optimizer's state."""
    saved = ModelCheckpoint(tmp_path / "pretraining")
    make_trainer(tmp_path, saved, enable_checkpointing=True, epochs=1).fit(Validated(), make_loader(0))
    base = saved.best_model_path
    start = load_checkpoint(base)
    start = {name.removeprefix("backbone."): value for name, value in start.items() if name.startswith("backbone.")}

    def pretrained():
        module = Validated()
        module.backbone.load_state_dict(start)
        return module

    first = pretrained()
    keep = TaskCheckpoint(str(tmp_path / "t.safetensors"), "a", save="task_vector", base=base)
    make_trainer(tmp_path, keep).fit(first, make_loader(1))
    module, others = pretrained(), [str(tmp_path / "t.safetensors")]
    merge = MergeAtFitEnd(TaskArithmetic(1.0), others, str(tmp_path / "m.safetensors"), base=base)
    preview = MergePreview(TaskArithmetic(1.0), base, others, {"a": make_loader(0)})
    make_trainer(tmp_path, preview, merge).fit(module, make_loader(0), make_loader(0))
    own, theirs = module.backbone.state_dict(), first.backbone.state_dict()
    expected = {name: own[name] + theirs[name] - value for name, value in start.items()}
    assert_close(load_checkpoint(tmp_path / "m.safetensors"), expected)
    norm = sum(float((own[name] - value).square().sum()) for name, value in start.items()) ** 0.5
    assert preview.similarity.norm == pytest.approx(norm, rel=1e-5)


def test_a_backbone_with_a_submodule_of_its_own_name(tmp_path):
    """The backbone has a submodule `backbone`, so `backbone.*` in the base are names inside the module's backbone."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.backbone, self.last = nn.Linear(6, 8), nn.Linear(8, 8)

        def forward(self, inputs):
            return self.last(self.backbone(inputs))

    base = Inner()
    save_checkpoint(tmp_path / "base.safetensors", base.state_dict())
    save_checkpoint(tmp_path / "other.safetensors", {name: value + 1 for name, value in base.state_dict().items()})
    module = Validated(Inner())
    merge = MergeAtFitEnd(
        TaskArithmetic(0.5),
        [str(tmp_path / "other.safetensors")],
        str(tmp_path / "m.safetensors"),
        base=str(tmp_path / "base.safetensors"),
    )
    make_trainer(tmp_path, merge).fit(module, make_loader(0))
    own = module.backbone.state_dict()
    expected = {name: value + 0.5 * (own[name] - value + 1) for name, value in base.state_dict().items()}
    assert_close(load_checkpoint(tmp_path / "m.safetensors"), expected)


def test_a_project_of_pytorch_lightning_previews_stops_early_and_merges_the_best(tmp_path, other):
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = make_backbone(), nn.Linear(8, 2)

        forward, training_step = Validated.forward, Validated.training_step

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * 2, batch[1]

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return make_loader(0)

        def val_dataloader(self):
            return make_loader(0)

    module, others = Module(), [str(tmp_path / "other.safetensors")]
    save_checkpoint(tmp_path / "base.safetensors", make_backbone().state_dict())
    preview = MergePreview(WeightAverage(), str(tmp_path / "base.safetensors"), others, {"a": Data()})
    merge = MergeAtFitEnd(WeightAverage(), others, str(tmp_path / "m.safetensors"), weights="best")
    best = pl.callbacks.ModelCheckpoint(tmp_path / "checkpoints", monitor="merged/mean_acc", mode="max")
    stop = pl.callbacks.EarlyStopping("merged/mean_acc", mode="max", patience=2)
    pl.Trainer(
        default_root_dir=tmp_path, max_epochs=3, accelerator="cpu", logger=pl.loggers.CSVLogger(tmp_path),
        enable_progress_bar=False, enable_model_summary=False, callbacks=[preview, merge, best, stop],
    ).fit(module, datamodule=Data())  # fmt: skip
    state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    expected = {name: (state[f"backbone.{name}"] + value) / 2 for name, value in other.items()}
    assert_close(load_checkpoint(tmp_path / "m.safetensors"), expected)
    assert isinstance(preview, L.Callback)
