"""The command line: a whole tiny run, resuming, choosing from and evaluating it, and refusing what makes no sense."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from freemerge.checkpoints import load_checkpoint
from freemerge.cli import main
from freemerge.merging import TaskArithmetic, merge
from freemerge.models import FreeModel
from tests import processes
from tests.tiny import OddNamesSuite, TinySuite

ROOT = Path(__file__).parent.parent.parent
TINY = str(ROOT / "tests" / "tiny.yaml")


def times(folder: Path) -> dict[str, float]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("stage.json"))}


STAGES = {
    "pretrain/stage.json",
    "finetune/corners/stage.json",
    "finetune/bars/stage.json",
    "merge/stage.json",
    "extracted/stage.json",
    "experts/corners/stage.json",
    "experts/bars/stage.json",
    "router/stage.json",
}


def test_fit_leaves_every_stages_results(run: Path) -> None:
    assert set(times(run)) == STAGES
    report = json.loads((run / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == [
        "base (probe)", "individual", "average", "task arithmetic", "TIES", "PCB", "FR",
        "FREE extracted (oracle)", "FREE trained (routed)", "FREE trained (oracle)", "router accuracy",
    ]  # fmt: skip
    assert set(report["search"]) == {"average", "task arithmetic", "TIES", "PCB", "FR", "FREE extracted"}
    assert [entry["scale"] for entry in report["search"]["FR"]] == [0.3, 1.0]
    assert report["settings"]["split"] == {"chosen_on": "val", "reported_on": "test"}
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "finetune" / "bars" / "logs" / "version_0" / "metrics.csv").exists()
    assert (run / "finetune" / "bars" / "checkpoints" / "last.ckpt").exists()


def test_the_reports_numbers_are_those_of_the_files(run: Path) -> None:
    report = {row["name"]: row for row in json.loads((run / "report.json").read_text())["rows"]}
    model, suite = FreeModel.from_pretrained(run / "free_model"), TinySuite()
    routed, oracle, router = {}, {}, {}
    with torch.no_grad():
        for index, (task, loader) in enumerate(suite.test_dataloader().items()):
            images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
            output = model(images)
            routed[task] = float(((output.task == index) & (output.labels == labels)).float().mean())
            router[task] = float((output.task == index).float().mean())
            oracle[task] = float((model(images, task=task).labels == labels).float().mean())
    assert report["FREE trained (routed)"]["scores"] == pytest.approx(routed)
    assert report["FREE trained (oracle)"]["scores"] == pytest.approx(oracle)
    assert report["router accuracy"]["scores"] == pytest.approx(router)
    sizes = sum(path.stat().st_size for path in (run / "experts").rglob("expert.safetensors"))
    assert report["FREE trained (oracle)"]["extra_bytes"] == sizes


def test_the_merged_file_is_the_merge_at_the_chosen_scale(run: Path) -> None:
    report = {row["name"]: row for row in json.loads((run / "report.json").read_text())["rows"]}
    chosen = report["task arithmetic"]["chosen"]["scale"]
    finetuned = [run / "finetune" / task / "backbone.safetensors" for task in TinySuite.TASKS]
    again = merge(run / "pretrain" / "base.safetensors", finetuned, TaskArithmetic(scale=chosen))
    merged = load_checkpoint(run / "merge" / "task_arithmetic.safetensors")
    assert all(torch.equal(again[name], merged[name]) for name in merged)


def test_a_second_run_skips_everything_and_prints_the_same_report(run: Path, capsys) -> None:
    before, report = times(run), (run / "report.json").read_text()
    assert main(["fit", "--config", TINY, "--run.folder", str(run)]) == 0
    assert times(run) == before
    assert (run / "report.json").read_text() == report
    assert "finetune bars: done already" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_numbers_elsewhere(run: Path, tmp_path) -> None:
    assert main(["fit", "--config", TINY, "--run.folder", str(tmp_path)]) == 0
    assert (tmp_path / "report.json").read_text() == (run / "report.json").read_text()


def test_only_what_depends_on_a_change_is_redone(run: Path, tmp_path) -> None:
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-a", str(run), str(folder)], check=True)
    before = times(folder)
    arguments = ["fit", "--config", TINY, "--run.folder", str(folder), "--experts.warmup", "0.2"]
    assert main([*arguments, "--run.overwrite", "true"]) == 0
    changed = {name for name, moment in times(folder).items() if moment != before[name]}
    assert changed == {"experts/corners/stage.json", "experts/bars/stage.json"}


def test_stages_and_tasks_can_be_chosen(tmp_path) -> None:
    arguments = ["fit", "--config", TINY, "--run.folder", str(tmp_path), "--data.tasks", "[bars]"]
    assert main([*arguments, "--run.stages", "[pretrain, finetune]"]) == 0
    assert set(times(tmp_path)) == {"pretrain/stage.json", "finetune/bars/stage.json"}


def test_a_stage_without_its_input_says_what_to_add(tmp_path, capsys) -> None:
    assert main(["fit", "--config", TINY, "--run.folder", str(tmp_path), "--run.stages", "[merge]"]) == 2
    assert "stage 'pretrain' has not been done with this configuration; add pretrain to run.stages" in _one_line(capsys)


def _one_line(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_an_interrupted_fit_goes_on_where_it_stopped(run: Path, tmp_path) -> None:
    """Killed after the first epoch of the second task, the run ends with the same report as one that was not."""
    script = f"""
import os, signal, sys
import lightning as L
from freemerge.cli import main
from freemerge.pipeline.trainers import MakeTrainer

class Kill(L.Callback):
    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1 and "bars" in trainer.default_root_dir:
            os.kill(os.getpid(), signal.SIGKILL)

make = MakeTrainer.__call__
MakeTrainer.__call__ = lambda self, *given: make(self, *given[:-1], [*given[-1], Kill()])
main(["fit", "--config", {TINY!r}, "--run.folder", {str(tmp_path)!r}])
"""
    killed = processes.run("-c", script)
    assert killed.returncode == -9, killed.stderr
    assert (tmp_path / "finetune" / "bars" / "started.json").exists()
    assert not (tmp_path / "finetune" / "bars" / "stage.json").exists()
    before = times(tmp_path)
    assert set(before) == {"pretrain/stage.json", "finetune/corners/stage.json"}
    assert main(["fit", "--config", TINY, "--run.folder", str(tmp_path)]) == 0
    assert {name: times(tmp_path)[name] for name in before} == before
    with (tmp_path / "finetune" / "bars" / "logs" / "version_1" / "metrics.csv").open() as file:
        assert {row["epoch"] for row in csv.DictReader(file)} == {"1"}  # the first epoch was not repeated
    assert (tmp_path / "report.json").read_text() == (run / "report.json").read_text()


def test_validate_test_and_predict_run_the_finished_model(run: Path, capsys) -> None:
    arguments = ["--config", TINY, "--run.folder", str(run), "--trainer.logger", "false"]
    assert main(["validate", *arguments]) == 0
    assert main(["test", *arguments]) == 0
    out = capsys.readouterr().out
    report = {row["name"]: row for row in json.loads((run / "report.json").read_text())["rows"]}
    for value in report["FREE trained (routed)"]["scores"].values():
        assert f"{100 * value:.1f}" in out
    assert main(["predict", *arguments, "--ckpt_path", str(run / "free_model")]) == 0
    with (run / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 90  # 45 test images of each task
    assert {row["class"] for row in rows} <= {"tl", "tr", "bl", "br", "flat", "upright"}
    right = [row for row in rows if row["loader"] == row["routed_task"]]
    assert len(right) / 90 == pytest.approx(report["router accuracy"]["average"])


def test_ckpt_path_resumes_one_fit_and_is_refused_for_several(run: Path, tmp_path, capsys) -> None:
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-a", str(run), str(folder)], check=True)
    checkpoint = str(folder / "finetune" / "bars" / "checkpoints" / "last.ckpt")
    arguments = ["fit", "--config", TINY, "--run.folder", str(folder), "--ckpt_path", checkpoint]
    assert main(arguments) == 2
    assert "--ckpt_path: these stages fit several models" in _one_line(capsys)
    assert main([*arguments, "--run.stages", "[finetune]", "--data.tasks", "[bars]"]) == 0
    for name in ("backbone", "head"):
        old = load_checkpoint(run / "finetune" / "bars" / f"{name}.safetensors")
        new = load_checkpoint(folder / "finetune" / "bars" / f"{name}.safetensors")
        assert all(torch.equal(old[key], new[key]) for key in old)


def test_several_configs_layer_and_the_command_line_wins(capsys) -> None:
    arguments = [
        "fit",
        "--config",
        TINY,
        "--config",
        str(ROOT / "configs" / "short.yaml"),
        "--trainer.gradient_clip_val",
        "0.5",
    ]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    short = yaml.safe_load((ROOT / "configs" / "short.yaml").read_text())
    assert config["trainer"]["max_epochs"] == short["trainer"]["max_epochs"]
    assert config["trainer"]["gradient_clip_val"] == 0.5
    assert config["data"]["class_path"] == "tests.tiny.TinySuite"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {folder: '${nope}'}", "run.folder: ${…} refers to 'nope', which is not in the configuration"),
        (
            "run: {folder: 'runs/${run.name}'}",
            "run.folder: ${…} refers to 'run.name', which is not in the configuration",
        ),
        ("run: {folder: '${run.folder}'}", "run.folder: ${…} has a syntax error, or refers to itself"),
        ("run: {folder: '${nope'}", "run.folder: ${…} has a syntax error, or refers to itself"),
        ("run: {folder: '${nope:1}'}", "run.folder: Unsupported interpolation type nope"),
        ("data: suite.yaml", "data.init_args.seed: ${…} refers to 'data.seed_everything', which"),
    ],
)
def test_an_interpolation_that_leads_nowhere_is_one_line(tmp_path, capsys, text: str, message: str) -> None:
    (tmp_path / "suite.yaml").write_text("class_path: tests.tiny.TinySuite\ninit_args: {seed: '${seed_everything}'}")
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", TINY, "--config", str(tmp_path / "bad.yaml"), "--print_config"])
    assert stop.value.code == 2
    assert _one_line(capsys).startswith(f"error: {message}")


def test_interpolation_reaches_the_data(run: Path, tmp_path) -> None:
    arguments = ["fit", "--config", TINY, "--run.folder", str(tmp_path), "--seed_everything", "5"]
    assert main([*arguments, "--run.stages", "[pretrain]"]) == 0
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["data"]["init_args"]["seed"] == 5


@pytest.mark.parametrize("config", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_parses_and_says_how_to_run_it(config: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    first = config.read_text().splitlines()[0]
    assert first.startswith("# python -m freemerge ")
    assert f"--config {config.relative_to(ROOT).as_posix()}" in first
    with pytest.raises(SystemExit) as stop:
        main([*first.removeprefix("# python -m freemerge ").split(), "--print_config"])
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)


def test_a_task_that_the_suite_does_not_have_is_named(tmp_path, capsys) -> None:
    assert main(["fit", "--config", TINY, "--run.folder", str(tmp_path), "--data.tasks", "[bar]"]) == 2
    assert "bars" in _one_line(capsys)


def test_tasks_with_reserved_names_run_to_the_end(tmp_path, capsys) -> None:
    arguments = ["--config", TINY, "--run.folder", str(tmp_path), "--data.class_path", "tests.tiny.NamesSuite"]
    assert main(["fit", *arguments, "--trainer.max_steps", "2", "--merge.scales", "[1.0]"]) == 0
    scores = json.loads((tmp_path / "report.json").read_text())["rows"][-2]["scores"]
    assert set(scores) == {"type", "v1.0 ü"}
    assert main(["test", *arguments]) == 0
    assert "v1.0 ü" in capsys.readouterr().out
    assert (tmp_path / "free_model" / "experts" / "v1.0 ü.safetensors").is_file()


def test_tasks_whose_names_look_like_markup_run_to_the_end(tmp_path, capsys) -> None:
    arguments = ["--config", TINY, "--run.folder", str(tmp_path), "--data.class_path", "tests.tiny.OddNamesSuite"]
    fit = ["fit", *arguments, "--trainer.max_steps", "2", "--merge.scales", "[1.0]"]
    assert main(fit) == 0
    names = OddNamesSuite.TASKS
    said = capsys.readouterr().out
    assert all(f"finetune {name} (" in said and f"experts {name}: " in said for name in names)
    assert any(all(name in line for name in names) for line in said.splitlines())  # the report's heading
    assert main(fit) == 0
    assert f"finetune {names[0]}: done already" in capsys.readouterr().out
    assert main(["test", *arguments]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in names)
    assert main(["predict", *arguments]) == 0
    with (tmp_path / "predictions.csv").open(encoding="utf-8") as file:
        assert {row["loader"] for row in csv.DictReader(file)} == set(names)
    assert FreeModel.from_pretrained(tmp_path / "free_model").tasks == names


def test_a_checkpoints_hyperparameters_do_not_beat_the_configuration(run: Path, tmp_path) -> None:
    checkpoint = torch.load(run / "finetune" / "bars" / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"] = {"label_smoothing": 0.3, "warmup": 0.1}
    torch.save(checkpoint, tmp_path / "mine.ckpt")
    folder = tmp_path / "run"
    arguments = ["fit", "--config", TINY, "--run.folder", str(folder), "--ckpt_path", str(tmp_path / "mine.ckpt")]
    with pytest.warns(match=r"mine.ckpt: was made with label_smoothing=0.3; using the configured value 0.2"):
        assert main([*arguments, "--model.label_smoothing", "0.2"]) == 2  # it does not say which fit to resume
    saved = yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]
    assert (saved["label_smoothing"], saved["warmup"]) == (0.2, 0.1)


def test_help_names_every_command(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    for line in ("fit  ", "validate  ", "test  ", "predict  ", "tune  ", "merge  ", "Merge finished checkpoints"):
        assert line in out


def test_merge_starts_without_lightning_and_transformers(run: Path, tmp_path) -> None:
    finetuned = [str(run / "finetune" / task / "backbone.safetensors") for task in TinySuite.TASKS]
    script = f"""
import sys
sys.argv = ["freemerge", "merge", "--base", {str(run / "pretrain" / "base.safetensors")!r},
            "--finetuned", {json.dumps(finetuned)!r}, "--method", "FRMerging", "--method.scale", "0.5",
            "--output", {str(tmp_path / "m.safetensors")!r}]
from freemerge.__main__ import main
assert main() == 0
assert not {{"lightning", "transformers", "torchmetrics"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(load_checkpoint(tmp_path / "m.safetensors")) == set(load_checkpoint(finetuned[0]))


def test_a_run_of_a_single_task_goes_through_all_stages(tmp_path) -> None:
    """Its router has nothing to tell apart, and is always right."""
    assert main(["fit", "--config", TINY, "--run.folder", str(tmp_path), "--data.tasks", "[corners]"]) == 0
    report = {row["name"]: row for row in json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["rows"]}
    assert report["router accuracy"]["scores"] == {"corners": 1.0}
    assert report["FREE trained (routed)"]["scores"] == report["FREE trained (oracle)"]["scores"]
    assert FreeModel.from_pretrained(tmp_path / "free_model").tasks == ("corners",)


def test_a_checkpoint_that_is_not_there_is_one_line_before_anything_is_built(tmp_path, capsys) -> None:
    for command, path, more in (
        ("fit", "nowhere.ckpt", ""),
        ("test", "nowhere", ""),
        ("fit", "last", "; an interrupted run resumes without this option"),
    ):
        options = ["--run.folder", str(tmp_path / "run"), "--ckpt_path", path, "--data.tasks", "[no such task]"]
        assert main([command, "--config", TINY, *options]) == 2
        assert capsys.readouterr().err == f"error: --ckpt_path: there is no file or folder {path}{more}\n"
    assert not (tmp_path / "run").exists()


def test_predict_writes_nothing_in_a_trial(run: Path, capsys) -> None:
    before = sorted(run.rglob("*"))
    assert main(["predict", "--config", TINY, "--run.folder", str(run), "--trainer.fast_dev_run", "true"]) == 0
    assert "fast_dev_run: the predictions were computed; nothing was written" in capsys.readouterr().out
    assert sorted(run.rglob("*")) == before
