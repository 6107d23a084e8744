"""`fit` on two processes (gloo, CPU), through the command line as a user would start it."""

import json
import subprocess
import sys
from pathlib import Path

from freemerge.cli import main

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "tests" / "tiny.yaml")


def test_fit_on_two_processes_reports_what_one_process_measures(tmp_path) -> None:
    """About 30 s: Lightning twice starts the second process as `python -m freemerge`, with all its imports.

    45 test and 37 validation samples do not divide by two ranks, so padding would show: one process, finding all stages
    done, evaluates the same files and must get the very same report.
    """
    command = [sys.executable, "-m", "freemerge", "fit", "--config", TINY, "--run.folder", str(tmp_path)]
    ddp = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = subprocess.run([*command, *ddp], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "MEMBER: 2/2" in done.stderr
    assert done.stdout.count("router accuracy") == 1  # only rank 0 prints
    report = (tmp_path / "report.json").read_text()
    command[3] = "test"  # Lightning's own test loop shards, and pads, by its distributed sampler
    tested = subprocess.run(
        [*command, *ddp, "--trainer.logger", "false"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert tested.returncode == 0, tested.stderr
    routed = next(row for row in json.loads(report)["rows"] if row["name"] == "FREE trained (routed)")
    for task, accuracy in routed["scores"].items():
        assert f"{task} {100 * accuracy:.1f}" in " ".join(tested.stdout.replace("│", " ").split())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("stage.json")}
    assert main(["fit", "--config", TINY, "--run.folder", str(tmp_path)]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("stage.json")} == before
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(report)
