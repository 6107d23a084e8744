"""The base that ships with freemerge: it is what its recipe makes, and knows more than a random network."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F

from freemerge.checkpoints import load_checkpoint
from freemerge.cli import main
from freemerge.data import Task
from freemerge.models import Backbone, TransformersBackbone
from freemerge.quickstart import QuickstartSuite
from tests import processes

ROOT = Path(__file__).parent.parent.parent
BASE = "freemerge.quickstart:base"


def nearest_prototype_accuracy(backbone: Backbone, task: Task) -> float:
    """Accuracy of the nearest class mean, by cosine, of four training images each."""
    images, labels = task.train.images.float() / 255, task.train.labels
    with torch.no_grad():
        # (C, 4, 1, 32, 32)
        chosen = torch.stack([images[labels == label][:4] for label in range(task.num_outputs)])
        features = backbone((chosen.flatten(0, 1) - 0.3) / 0.3).unflatten(0, chosen.shape[:2])
        means = F.normalize(F.normalize(features, dim=-1).mean(dim=1), dim=-1)  # (C, F)
        cosines = F.normalize(backbone((task.test.images.float() / 255 - 0.3) / 0.3), dim=-1) @ means.T
    return float((cosines.argmax(dim=1) == task.test.labels).float().mean())


def test_the_base_is_small_and_pretrained() -> None:
    torch.manual_seed(0)
    base = TransformersBackbone(pretrained=BASE, pooling="mean").eval()
    assert base.pretrained
    assert sum(each.numel() for each in base.parameters()) == 455_520
    assert {each.dtype for each in base.parameters()} == {torch.float32}
    random = TransformersBackbone(config=base.model.config.to_dict(), pooling="mean").eval()
    suite = QuickstartSuite()
    for name in ("letters", "textures"):
        task = suite.task(name)
        accuracy = nearest_prototype_accuracy(base, task)
        assert accuracy > 0.55
        assert accuracy > nearest_prototype_accuracy(random, task) + 0.1


def test_the_recipe_and_its_tool_make_such_a_folder(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    short = ["--pretrain.trainer.max_epochs", "1", "--pretrain.trainer.limit_train_batches", "2",
             "--pretrain.trainer.limit_val_batches", "1"]  # fmt: skip
    arguments = ["fit", "--config", "configs/quickstart_base.yaml", "--run.folder", str(tmp_path / "run")]
    assert main([*arguments, *short, "--trainer.enable_progress_bar", "false"]) == 0
    tool = ROOT / "tools" / "pack_quickstart_base.py"
    packed = processes.run(tool, tmp_path / "run", "--output", tmp_path / "base")
    assert packed.returncode == 0, packed.stderr
    made = TransformersBackbone(pretrained=str(tmp_path / "base"), pooling="mean").weights()
    trained = load_checkpoint(tmp_path / "run" / "base.safetensors")
    shipped = TransformersBackbone(pretrained=BASE, pooling="mean").weights()
    assert made.keys() == trained.keys() == shipped.keys()
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, trained[name].half().float(), rtol=0, atol=0)
        assert tensor.shape == shipped[name].shape
