"""`tune`: on validation data alone, within a budget, from a run's own or anybody's finished models."""

import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from freemerge.checkpoints import load_checkpoint
from freemerge.cli import main
from freemerge.merging import FRMerging
from freemerge.pipeline.measure import Measure
from freemerge.pipeline.others import Others
from freemerge.tuning import Range, Search, Space, searchers
from tests import processes

ROOT = Path(__file__).parent.parent.parent
TINY = str(ROOT / "tests" / "tiny.yaml")


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def own(run: Path, tmp_path_factory) -> Path:
    """A copy of the finished run, to be tuned in."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    shutil.copytree(run, folder)
    return folder


def test_tune_finds_a_scale_for_each_task_on_validation_data(own: Path, run: Path, monkeypatch, capsys) -> None:
    splits = []
    loaders = Measure.loaders
    monkeypatch.setattr(Measure, "loaders", lambda self, split: splits.append(split) or loaders(self, split))
    arguments = ["tune", "--config", TINY, "--run.folder", str(own), "--tune.trials", "6"]
    assert main(arguments) == 0
    assert splits == ["val", "test"]  # test data once, when the search is over
    written = report(own / "tune" / "fr")
    trials = written["search"]["FR"]
    assert [trial["trial"] for trial in trials] == list(range(6))
    assert trials[0]["scale/corners"] == trials[0]["scale/bars"] == 1.0  # as configured
    grid = json.loads((run / "merge" / "stage.json").read_text())["results"]["methods"]["FR"]["best"]
    assert trials[1]["scale/corners"] == trials[1]["scale/bars"] == grid["scale"]
    assert trials[1]["value"] == pytest.approx(grid["mean_acc"])  # the grid's own measurement of that scale
    assert trials[0]["value"] == pytest.approx(sum(trials[0]["scores"].values()) / 2)
    rows = {row["name"]: row for row in written["rows"]}
    assert list(rows) == ["individual", "FR as configured", "FR tuned"]
    best = max(trials, key=lambda trial: trial["value"])
    assert rows["FR tuned"]["chosen"]["val"] == best["value"] >= grid["mean_acc"]
    assert written["settings"]["budget"] == {"trials": 6, "seconds": None, "used": 6}
    assert written["settings"]["split"] == {"chosen_on": "val", "reported_on": "test"}
    assert written["settings"]["space"] == {"scale": {"low": 0.0, "high": 2.0, "log": False, "per_task": True}}
    assert "FR as configured" in capsys.readouterr().out

    # Again: nothing is left to do. With a larger budget: it goes on.
    monkeypatch.setattr(Measure, "shared", None)
    assert main(arguments) == 0
    assert "done already" in capsys.readouterr().out
    monkeypatch.undo()
    assert main([*arguments[:-1], "9"]) == 0
    assert report(own / "tune" / "fr")["search"]["FR"][:6] == trials
    assert len(report(own / "tune" / "fr")["search"]["FR"]) == 9


def test_what_was_found_is_what_merge_makes_of_its_configuration(own: Path) -> None:
    tuned = own / "tune" / "fr"
    path = tuned / "merge.yaml"
    assert path.read_text().startswith(f"# python -m freemerge merge --config {path}\n")
    assert main(["merge", "--config", str(path)]) == 0
    merged, again = load_checkpoint(tuned / "merged.safetensors"), load_checkpoint(tuned / "again.safetensors")
    assert merged.keys() == again.keys()
    assert all(torch.equal(merged[name], again[name]) for name in merged)
    scales = yaml.safe_load(path.read_text())["method"]["init_args"]["scale"]
    chosen = report(tuned)["rows"][2]["chosen"]
    assert scales == [chosen["scale/corners"], chosen["scale/bars"]]


def test_other_settings_do_not_wipe_a_search_that_is_running(own: Path, tmp_path, capsys) -> None:
    folder = tmp_path / "run"
    shutil.copytree(own, folder)
    journal = folder / "tune" / "fr" / "study.journal"
    codes = []

    def objective(point):
        codes.append(main(["tune", "--config", TINY, "--run.folder", str(folder), "--tune.goal", "worst"]))
        return 0.0, {}

    search = Search(journal, Space(FRMerging(), (), {"scale": Range(0.0, 1.0)}), "random")
    search.run(objective, trials=len(search.trials()) + 1)
    assert codes == [2]
    message = capsys.readouterr().err
    assert f"process {socket.gethostname()}:{os.getpid()} is searching there with other settings" in message
    assert searchers(journal) == []
    assert len(search.trials()) == 10


def test_any_number_of_any_method_over_finished_models(run: Path, tmp_path) -> None:
    (tmp_path / "tune.yaml").write_text(f"""
tune:
  models: {run}
  method: {{class_path: PCBMerging, init_args: {{filter: {{class_path: HighPass, init_args: {{cutoff: 0.1}}}}}}}}
  space:
    ratio: {{low: 0.05, high: 1.0, log: true}}
    filter.cutoff: {{low: 0.0, high: 0.5}}
    scale: {{low: 0.0, high: 2.0}}
  trials: 4
  sampler: tpe
  goal: worst
""")
    folder = tmp_path / "run"
    assert main(["tune", "--config", TINY, "--config", str(tmp_path / "tune.yaml"), "--run.folder", str(folder)]) == 0
    written = report(folder / "tune" / "pcbmerging")
    trials = written["search"]["PCBMerging"]
    assert {"ratio", "filter.cutoff", "scale"} <= trials[0].keys()
    method = written["settings"]["method"]["init_args"]
    best = max(trials, key=lambda trial: trial["value"])
    assert (method["ratio"], method["scale"]) == (best["ratio"], best["scale"])
    assert method["filter"]["init_args"]["cutoff"] == best["filter.cutoff"]
    finetuned = yaml.safe_load((folder / "tune" / "pcbmerging" / "merge.yaml").read_text())["finetuned"]
    assert finetuned["bars"] == str(run / "finetune" / "bars" / "backbone.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tune.line", "FRR"], "tune.line: there is no method 'FRR' in merge.methods: average, task arithmetic"),
        (["--tune.line", "average"], "tune: WeightAverage has no scale to search for"),
        (["--tune.space", "{scal: {low: 0, high: 1}}"], "FRMerging has no parameter 'scal'; did you mean 'scale'?"),
        (["--tune.space", "{scale: {low: 1, high: 1}}"], "tune.space: low must be less than high"),
        (
            ["--tune.sampler", "cma"],
            "tune.sampler: expected one of cmaes, tpe, random, got 'cma'",
        ),
        (["--tune.trials", "0"], "tune.trials: must be at least 1, got 0"),
        ([], "stage 'pretrain' has not been done with this configuration; add pretrain to run.stages"),
    ],
)
def test_tune_refuses_wrong_settings_in_one_line(options, message, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(main(["tune", "--config", TINY, "--run.folder", str(tmp_path), *options]))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_without_optuna_it_says_what_to_install(own: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "cmaes", None)
    assert main(["tune", "--config", TINY, "--run.folder", str(own), "--tune.trials", "99"]) == 2
    assert "error: tune needs cmaes: pip install 'freemerge[tune]'\n" in capsys.readouterr().err


def owners(folder: Path) -> list[str]:
    """Whose each trial of a study is."""
    lines = (folder / "study.journal").read_text().splitlines() if (folder / "study.journal").exists() else []
    return [json.loads(line)["user_attr"]["owner"] for line in lines if '"owner"' in line]


def test_two_processes_search_together_and_one_brings_it_to_its_end(run: Path, tmp_path, capsys) -> None:
    options = ["tune", "--config", TINY, "--run.folder", str(tmp_path), "--tune.models", str(run)]
    options += ["--tune.trials", "24", "--data", "tests.tiny.SlowSuite"]
    other = processes.Started("-m", "freemerge", *options, "--tune.part", "search")
    while other.poll() is None and not owners(tmp_path / "tune" / "fr"):
        time.sleep(0.1)
    assert main(options) == 0
    out, error = other.communicate(timeout=60)
    assert (other.returncode, out, error) == (0, "", "")
    assert "FR as configured" in capsys.readouterr().out
    assert len(report(tmp_path / "tune" / "fr")["search"]["FR"]) == 24
    assert len(set(owners(tmp_path / "tune" / "fr"))) == 2


def test_each_device_gets_a_process_of_its_own(run: Path, tmp_path, monkeypatch) -> None:
    started, joined = [], []
    monkeypatch.setattr(Others, "start", lambda self: started.extend(self.commands))
    monkeypatch.setattr(Others, "join", lambda self: joined.append(True))
    options = ["tune", "--config", TINY, "--run.folder", str(tmp_path), "--tune.models", str(run), "--tune.trials", "2"]
    assert main([*options, "--trainer.devices", "3"]) == 0
    assert len(started) == 2
    assert joined == [True]
    assert main([*started[0], "--tune.trials", "3"]) == 0  # what the others are told takes part in the same search
    assert len(set(owners(tmp_path / "tune" / "fr"))) == 1
    assert len(owners(tmp_path / "tune" / "fr")) == 3
    assert len(started) == 2  # and starts no further ones


def test_the_other_processes_are_run_and_their_failure_is_told(capfd) -> None:
    others = Others([["merge", "--help"], ["merge", "--hlp"]])
    others.start()
    with pytest.raises(ValueError, match="a process of another device ended with exit code 2"):
        others.join()
    captured = capfd.readouterr()
    assert captured.out.startswith("usage: python -m freemerge merge")
    assert captured.err == "error: there is no option '--hlp'; did you mean '--help'?\n"
