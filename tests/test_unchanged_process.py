"""The library, the callbacks and the pipeline leave the process unchanged; only the command line may change it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "unchanged_process.py"


@pytest.mark.parametrize("what", ["merges", "callbacks", "models"])
def test_the_process_is_unchanged(what, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PL_")}
    command = [sys.executable, str(PROGRAM), what, str(tmp_path)]
    done = subprocess.run(command, cwd=PROGRAM.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report) >= 4
    assert {action: changed for action, changed in report.items() if changed} == {}
