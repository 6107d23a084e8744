"""A leading ~ means the home folder in every path; no folder named ~ is created."""

from pathlib import Path

import numpy as np
import pytest
import torch

from freemerge.checkpoints import load_checkpoint
from freemerge.cli import main
from freemerge.data.sources import NpzSource, TextTableSource
from freemerge.data.sources.texts import load_tokenizer, read_class_names
from freemerge.experts import extract, load_expert, save_expert
from freemerge.merging import WeightAverage
from freemerge.models import FreeModel, TransformersBackbone
from freemerge.models.backbones.base import load_backbone
from freemerge.pipeline import SuiteRun
from freemerge.training import FineTuner
from freemerge_callbacks import MergeAtFitEnd, MergePreview, TaskCheckpoint, save_base
from tests.callbacks.callbacks_project import Plain, make_backbone, make_loader, make_trainer
from tests.tiny import TinySuite, tiny_backbone

TINY = str(Path(__file__).parent / "tiny.yaml")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder outside the working directory; afterwards the working directory must be unchanged."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    yield home
    assert not (here / "~").exists()


def test_a_run_its_logs_and_its_cache_may_be_in_the_home_folder(home) -> None:
    fit = ["fit", "--config", TINY, "--run.folder", "~/run", "--run.stages", "[pretrain]", "--trainer.max_epochs", "1"]
    assert main([*fit, "--pretrain.cache", "~/cache", "--trainer.default_root_dir", "~/root"]) == 0
    assert {path.name for path in (home / "run").iterdir()} >= {"config.yaml", "pretrain", "base.safetensors"}
    assert list((home / "run" / "pretrain" / "logs").rglob("metrics.csv"))
    assert list((home / "cache").rglob("base.safetensors"))


def test_a_checkpoint_to_resume_from_may_be_in_the_home_folder(home) -> None:
    tuner = FineTuner(tiny_backbone())
    run = SuiteRun(tuner, TinySuite(), "~/run", {"default_root_dir": home}, ckpt_path="~/a.ckpt")
    assert (run.folder, run.ckpt_path) == (home / "run", str(home / "a.ckpt"))


def test_models_for_tune_may_be_in_the_home_folder(home, capsys) -> None:
    assert main(["tune", "--config", TINY, "--run.folder", "~/run", "--tune.models", "~/finished"]) == 2
    assert str(home / "finished") in capsys.readouterr().err


def test_experts_and_backbones(home) -> None:
    expert = extract({"w": torch.eye(4)}, 0.25)
    assert save_expert("~/experts/a.safetensors", expert, "float32") == home / "experts" / "a.safetensors"
    assert torch.equal(load_expert("~/experts/a.safetensors").dense()["w"], torch.eye(4))
    backbone = tiny_backbone()
    backbone.save_pretrained("~/backbone")
    for again in (load_backbone("~/backbone"), TransformersBackbone("~/backbone", pooling="mean")):
        assert all(torch.equal(again.weights()[name], tensor) for name, tensor in backbone.weights().items())


def test_a_free_model(home) -> None:
    model = FreeModel(tiny_backbone(), heads={"a": torch.nn.Linear(16, 2)}, experts={})
    assert model.save_pretrained("~/free") == home / "free"
    again = FreeModel.from_pretrained("~/free")
    assert torch.equal(again.heads["a"].weight, model.heads["a"].weight)


def test_data_sources_and_their_keys(home) -> None:
    pixels = np.arange(12 * 4, dtype=np.uint8).reshape(12, 2, 2)
    labels = np.tile([0, 1], 6)
    np.savez(home / "a.npz", **{f"{split}_{what}": value for split in ("train", "val", "test")
                                for what, value in (("images", pixels), ("labels", labels))})  # fmt: skip
    short, long = NpzSource(path="~/a.npz"), NpzSource(path=str(home / "a.npz"))
    assert len(short.build("a", 0).train) == 12
    assert short.identity() == long.identity()
    (home / "t.csv").write_text("text,label\nx,0\ny,1\n", encoding="utf-8")
    (home / "t.classes.txt").write_text("no\nyes\n", encoding="utf-8")
    source = TextTableSource(path="~/t.csv", tokenizer="~/tokenizer", text=["text"], label="label")
    assert source.files() == [home / "t.csv", home / "t.classes.txt"]
    assert read_class_names("~/t.classes.txt") == ("no", "yes")
    with pytest.raises(ValueError, match=str(home / "tokenizer")):
        load_tokenizer("~/tokenizer")


def test_callbacks(home) -> None:
    save_base(Plain(), "~/base.safetensors")
    single = TaskCheckpoint(output="~/tasks/a.safetensors", task="a", base="~/base.safetensors")
    merge = MergeAtFitEnd(
        WeightAverage(), registry="~/shared", task="a", tasks=["a"], output="~/m.safetensors", base="~/base.safetensors"
    )
    make_trainer(home, single, merge).fit(Plain(), make_loader(0))
    assert single.saved_path == home / "tasks" / "a.safetensors"
    assert load_checkpoint(home / "m.safetensors").keys() == make_backbone().state_dict().keys()
    assert (home / "shared" / "a.safetensors").exists()
    again = MergeAtFitEnd(
        WeightAverage(), others=["~/tasks/*.safetensors"], output="~/n.safetensors", base="~/base.safetensors"
    )
    make_trainer(home, again).fit(Plain(), make_loader(0))
    assert load_checkpoint(home / "n.safetensors").keys() == make_backbone().state_dict().keys()
    preview = MergePreview(WeightAverage(), base="~/base.safetensors", others=["~/n.safetensors"], loaders={})
    assert preview.base.path == home / "base.safetensors"
