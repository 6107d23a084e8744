"""What the tests of the command line share: one finished run."""

from pathlib import Path

import pytest

from freemerge.cli import main

TINY = str(Path(__file__).parent.parent / "tiny.yaml")


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A finished tiny run."""
    folder = tmp_path_factory.mktemp("run")
    assert main(["fit", "--config", TINY, "--run.folder", str(folder)]) == 0
    return folder
