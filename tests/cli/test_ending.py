"""How a merge ends that is stopped from outside, or has nowhere to write."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from freemerge.checkpoints import load_checkpoint, save_checkpoint
from tests import processes

METHOD = """
import os
import signal
import time
from dataclasses import dataclass

from freemerge.merging import TaskArithmetic


@dataclass(frozen=True)
class Stopped(TaskArithmetic):
    '''Task arithmetic whose process is sent a signal at one of the tensors.'''

    def combine(self, name, deltas, statistics):
        if name == "w5" and "STOP_BY" in os.environ:
            os.kill(os.getpid(), int(os.environ["STOP_BY"]))
            time.sleep(0.2)
        return super().combine(name, deltas, statistics)
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with a base, two fine-tuned models and a method, `stopped.Stopped`."""
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "x", "y"):
        tensors = {f"w{index}": torch.randn(64, 64, generator=generator) for index in range(12)}
        save_checkpoint(tmp_path / f"{name}.safetensors", tensors)
    (tmp_path / "stopped.py").write_text(METHOD, encoding="utf-8")
    return tmp_path


def _merge(folder: Path, *words: str, **more) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **more.pop("env", {})}
    inputs = ["--base", "base.safetensors", "--finetuned", "x.safetensors", "y.safetensors"]
    command = ["-m", "freemerge", "merge", *inputs, "--method", "stopped.Stopped", *words]
    return processes.run(*command, cwd=folder, env=environment, **more)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_merge_is_one_line_and_goes_on(number, code, models) -> None:
    words = ["--output", "out.safetensors", "--resume"]
    ended = _merge(models, *words, env={"STOP_BY": str(int(number))})
    assert ended.returncode == code
    assert ended.stderr.startswith("error: interrupted; the finished part is kept beside the output")
    assert ended.stderr.count("\n") == 1
    assert not (models / "out.safetensors").exists()
    assert _merge(models, *words).returncode == 0
    base, x, y = (load_checkpoint(models / f"{name}.safetensors") for name in ("base", "x", "y"))
    merged = load_checkpoint(models / "out.safetensors")
    for name, start in base.items():
        expected = start + 0.3 * ((x[name] - start) + (y[name] - start))
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-5)
    assert _merge(models, "--output", "undisturbed.safetensors").returncode == 0
    assert (models / "out.safetensors").read_bytes() == (models / "undisturbed.safetensors").read_bytes()


def test_an_interrupted_merge_that_is_not_to_be_resumed_leaves_nothing(models) -> None:
    before = set(models.iterdir())
    ended = _merge(models, "--output", "out.safetensors", env={"STOP_BY": str(int(signal.SIGINT))})
    assert ended.returncode == 130
    assert ended.stderr.startswith("error: interrupted; nothing was written")
    assert ended.stderr.count("\n") == 1
    assert {path for path in models.iterdir() if path.name != "__pycache__"} == before


@pytest.mark.parametrize("output", ["base.safetensors/inside", "/proc/nothing/out.safetensors"])
def test_an_output_that_cannot_be_written_is_one_line(output, models) -> None:
    ended = _merge(models, "--output", output)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {output}: cannot be written: ")
    assert ended.stderr.count("\n") == 1


def test_a_file_that_outgrows_what_may_be_written_is_one_line_and_leaves_nothing(models) -> None:
    before = set(models.iterdir())
    ended = _merge(models, "--output", "out.safetensors", file_size=20_000)
    assert ended.returncode == 2
    assert ended.stderr == "error: out.safetensors: cannot be written: File too large\n"
    assert {path for path in models.iterdir() if path.name != "__pycache__"} == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a file that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_help_that_cannot_be_written_is_one_line(unbuffered) -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "freemerge", "merge", "--help"]
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "error: the output cannot be written: No space left on device\n"
