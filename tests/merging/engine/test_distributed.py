"""Several processes divide a merge, an interrupted merge resumes, and a dry run prints the plan."""

import json
import os
import subprocess
import sys

import pytest
import torch

from freemerge.checkpoints import save_checkpoint
from freemerge.merging import FRMerging, MergeError, PCBMerging, TaskArithmetic, Ties, merge
from freemerge.runtime import threads
from freemerge.runtime.processes import Processes
from tests import processes
from tests.merging.merging_models import METHODS

GLOBAL = {"PCBMerging": PCBMerging(ratio=0.3), "FRMerging": FRMerging(coefficients="mean"), "Ties": Ties(0.3)}

WORK = """
import sys, torch, torch.distributed as dist
from freemerge.merging import FRMerging, MergeError, PCBMerging, Ties, merge
from tests.merging.engine.test_distributed import GLOBAL
folder = sys.argv[1]
dist.init_process_group("gloo")
inputs = (f"{folder}/base.safetensors", [f"{folder}/a.safetensors", f"{folder}/b.safetensors"])
for name, method in GLOBAL.items():
    merge(*inputs, method, output=f"{folder}/{name}.safetensors", distributed=True)
    merge(*inputs, method, output=f"{folder}/{name}", shard_size=3000, distributed=True)
    merge(*inputs, method, output=f"{folder}/{name}-lora", output_format="lora", rank=4, exclude=["bias"],
          distributed=True)
try:
    merge(inputs[0], [f"{folder}/a.safetensors", f"{folder}/broken.safetensors"], Ties(), output=f"{folder}/no",
          distributed=True)
except MergeError as error:
    print(f"rank {dist.get_rank()}: {error}", file=sys.stderr)
dist.destroy_process_group()
"""


@pytest.fixture
def inputs(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {f"layer{index}.weight": torch.randn(20, 30, generator=generator) for index in range(6)}
    base |= {"bias": torch.randn(7, generator=generator), "steps": torch.tensor(3)}
    save_checkpoint(tmp_path / "base.safetensors", base)
    for name in ("a", "b"):
        tuned = {key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in base.items()}
        save_checkpoint(tmp_path / f"{name}.safetensors", tuned | {"steps": torch.tensor(9)})
    save_checkpoint(tmp_path / "broken.safetensors", tuned | {"layer3.weight": torch.full((20, 30), torch.nan)})
    return tmp_path / "base.safetensors", [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]


def test_two_processes_write_the_same_files_as_one(tmp_path, inputs):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command += [sys.executable, "-c", WORK, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for name, method in GLOBAL.items():
        one = merge(*inputs, method, output=tmp_path / "one.safetensors", overwrite=True)
        assert one.read_bytes() == (tmp_path / f"{name}.safetensors").read_bytes()
        one = merge(*inputs, method, output=tmp_path / "one", shard_size=3000, overwrite=True)
        for path in one.iterdir():
            if path.name != "README.md":  # names the folder
                assert path.read_bytes() == (tmp_path / name / path.name).read_bytes(), path.name
        merge(*inputs, method, output=tmp_path / "lora", output_format="lora", rank=4, exclude=["bias"], overwrite=True)
        for file in ("adapter_model.safetensors", "adapter_config.json", "freemerge.json"):
            assert (tmp_path / "lora" / file).read_bytes() == (tmp_path / f"{name}-lora" / file).read_bytes()
    # What fails in one fails in all, with the same words, and nothing is left.
    for rank in (0, 1):
        assert f"rank {rank}: " in done.stderr
    assert done.stderr.count("broken.safetensors: the tensor 'layer3.weight'") == 2
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".") or path.name == "no"]


def test_tensors_are_dealt_out_evenly_and_once():
    shapes = {f"w{index}": (index + 1, 10) for index in range(9)}
    shares = []
    for rank in range(3):
        processes = Processes()
        processes.rank, processes.size = rank, 3
        shares.append(processes.share(shapes))
    assert sorted(name for share in shares for name in share) == sorted(shapes)
    assert [sum(shapes[name][0] for name in share) for share in shares] == [16, 15, 14]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_the_number_of_threads_changes_nothing(base, models, method, monkeypatch):
    expected = merge(base, models, method)
    monkeypatch.setattr(threads, "team_size", lambda: 3)
    found = merge(base, models, method)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_processes_need_a_group_and_something_to_write(inputs, tmp_path):
    with pytest.raises(MergeError, match=r"init_process_group first \(torchrun\)"):
        merge(*inputs, TaskArithmetic(), output=tmp_path / "m", distributed=True)
    with pytest.raises(MergeError, match="a distributed merge has to write its result"):
        merge(*inputs, TaskArithmetic(), distributed=True)
    with pytest.raises(MergeError, match="into an adapter cannot be resumed: nothing of it is on the disk before"):
        merge(*inputs, TaskArithmetic(), output=tmp_path / "m", output_format="lora", rank=2, resume=True)


INTERRUPTED = """
import os, signal, sys
from freemerge.checkpoints.writing import draft
from freemerge.merging import PCBMerging, merge
draft._NOTED = 1  # what is written is noted at once
real, calls = draft._write_at, []
def write(*arguments):
    real(*arguments)
    calls.append(1)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
draft._write_at = write
folder = sys.argv[1]
merge(f"{folder}/base.safetensors", [f"{folder}/a.safetensors", f"{folder}/b.safetensors"], PCBMerging(),
      output=f"{folder}/{sys.argv[2]}", shard_size=3000)
"""


@pytest.mark.parametrize("output", ["m.safetensors", "m"])
def test_a_killed_merge_is_resumed(tmp_path, inputs, output, monkeypatch):
    assert processes.run("-c", INTERRUPTED, tmp_path, output).returncode == -9
    assert not (tmp_path / output).exists()
    from freemerge.checkpoints.writing import draft

    written = []
    real = draft.Draft.write
    monkeypatch.setattr(draft.Draft, "write", lambda self, name, *rest: (written.append(name), real(self, name, *rest)))
    merge(*inputs, PCBMerging(), output=tmp_path / output, shard_size=3000, resume=True)
    assert 0 < len(set(written)) < 8
    whole = tmp_path / ("w.safetensors" if output.endswith(".safetensors") else "w")
    merge(*inputs, PCBMerging(), output=whole, shard_size=3000)
    for path in whole.iterdir() if whole.is_dir() else [whole]:
        if path.name != "README.md":
            assert (
                path.read_bytes()
                == (tmp_path / output / path.name if whole.is_dir() else tmp_path / output).read_bytes()
            )


def test_progress_counts_every_pass(inputs, monkeypatch):
    monkeypatch.setattr("freemerge.merging.engine.meter._REPORTED", 1)
    for method in (TaskArithmetic(), PCBMerging(), FRMerging(), FRMerging(coefficients="mean")):
        seen = []
        merge(*inputs, method, progress=lambda done, total, seen=seen: seen.append((done, total)))
        total = method.passes * 3 * 4 * (6 * 600 + 7)
        assert seen[-1] == (total, total)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_dry_run_writes_nothing_and_tells_all(inputs, tmp_path):
    found = merge(*inputs, PCBMerging(), output=tmp_path / "m", exclude=["bias"], shard_size=5000, dry_run=True)
    assert not (tmp_path / "m").exists()
    assert (len(found.merged), list(found.kept), found.parameters) == (6, ["steps", "bias"], 3600)
    assert (found.passes, found.read) == (3, 3 * 3 * 4 * 3600)
    assert sum(found.files.values()) == 4 * 3607 + 8
    assert len(found.files) == 3
    assert str(found).startswith("6 tensors of 3,600 parameters to merge, 2 to keep, 0 tied; 3 passes over the models")
    with pytest.raises(MergeError, match="matches no tensor"):
        merge(*inputs, PCBMerging(), exclude=["biass"], dry_run=True)
    assert json.dumps(list(found.files)).count("of-00003") == 3
