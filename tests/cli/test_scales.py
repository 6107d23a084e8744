"""The search over scales of a run: what is measured is what a merge at that scale makes, whatever the method."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from freemerge.checkpoints import load_checkpoint
from freemerge.cli import main
from freemerge.merging import MergeMethod, PCBMerging, TaskArithmetic, merge
from freemerge.pipeline.measure import Measure
from tests.tiny import TinySuite

TINY = str(Path(__file__).parent.parent / "tiny.yaml")
METHODS = """
merge:
  scales: [0.5, 1.5]
  free: ratios
  methods:
    clipped: {class_path: tests.cli.test_scales.Clipped}
    ratios: {class_path: TaskArithmetic, init_args: {scale: [1.0, 0.25]}}
    PCB: {class_path: PCBMerging}
"""


@dataclass(frozen=True)
class Clipped(MergeMethod):
    """Not linear in its scale."""

    scale: float = 1.0

    def combine(self, name, deltas, statistics):
        return (deltas.sum(0) * self.scale).clamp(-1e-3, 1e-3)


def test_what_is_measured_is_merged_at_that_scale(run: Path, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (tmp_path / "methods.yaml").write_text(METHODS)
    measured = []
    shared = Measure.shared

    def remember(self, weights, heads, loaders):
        scores = shared(self, weights, heads, loaders)
        if len(loaders) > 1:  # and not one of the fine-tuned models on its own task
            measured.append((dict(weights), sum(scores.values()) / len(scores)))
        return scores

    monkeypatch.setattr(Measure, "shared", remember)
    arguments = ["fit", "--config", TINY, "--config", str(tmp_path / "methods.yaml"), "--run.folder", str(folder)]
    assert main([*arguments, "--run.stages", "[merge]", "--run.overwrite", "true"]) == 0

    finetuned = [folder / "finetune" / task / "backbone.safetensors" for task in TinySuite.TASKS]
    found = json.loads((folder / "merge" / "stage.json").read_text())["results"]["methods"]
    anew = {
        "clipped": [Clipped(0.5), Clipped(1.5)],
        "ratios": [TaskArithmetic([0.5, 0.125]), TaskArithmetic([1.5, 0.375])],
        "PCB": [PCBMerging(scale=0.5), PCBMerging(scale=1.5)],
    }
    assert len(measured) == 6
    for name, methods in anew.items():
        expected = [merge(folder / "pretrain" / "base.safetensors", finetuned, method) for method in methods]
        for entry, scale, weights in zip(found[name]["search"], (0.5, 1.5), expected, strict=True):
            candidate, accuracy = measured.pop(0)
            for tensor in weights:
                torch.testing.assert_close(candidate[tensor], weights[tensor], rtol=1e-6, atol=1e-6)
            assert entry == {"scale": scale, "mean_acc": pytest.approx(accuracy)}
        best = (0.5, 1.5).index(found[name]["best"]["scale"])
        written = load_checkpoint(folder / "merge" / f"{name.lower()}.safetensors")
        assert all(torch.equal(written[tensor], expected[best][tensor]) for tensor in written)


def test_a_search_begins_at_the_grids_scale_with_the_tasks_own_ratios(run: Path, tmp_path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (tmp_path / "methods.yaml").write_text(METHODS)
    arguments = ["--config", TINY, "--config", str(tmp_path / "methods.yaml"), "--run.folder", str(folder)]
    assert main(["fit", *arguments, "--run.stages", "[merge]", "--run.overwrite", "true"]) == 0
    grid = json.loads((folder / "merge" / "stage.json").read_text())["results"]["methods"]["ratios"]["best"]["scale"]
    assert main(["tune", *arguments, "--tune.line", "ratios", "--tune.trials", "2"]) == 0
    trials = json.loads((folder / "tune" / "ratios" / "report.json").read_text())["search"]["ratios"]
    points = [[trial[f"scale/{task}"] for task in TinySuite.TASKS] for trial in trials]
    assert points == [[1.0, 0.25], [grid, 0.25 * grid]]
