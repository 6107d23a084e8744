"""The library, the callbacks and the pipeline leave the process unchanged; only the command line may change it."""

import json
import os
from pathlib import Path

import pytest

from tests import processes

PROGRAM = Path(__file__).parent / "unchanged_process.py"


@pytest.mark.parametrize("what", ["merges", "callbacks", "models"])
def test_the_process_is_unchanged(what, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PL_")}
    done = processes.run(PROGRAM, what, tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report) >= 4
    assert {action: changed for action, changed in report.items() if changed} == {}
