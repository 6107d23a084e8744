"""A merge never loses or corrupts files: kills, full disks, broken inputs, outputs in the wrong place.

Every failure is one line on stderr that names the file, has a nonzero exit code, and leaves all files unchanged.
"""

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from freemerge.__main__ import main
from tests import processes

linux = pytest.mark.skipif(sys.platform != "linux", reason="limits and mounts are Linux's")
OUTPUTS = ["merged.safetensors", "merged"]


def make_model(seed):
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{index:02d}.weight": torch.randn(128, 128, generator=generator) for index in range(16)}  # 1 MiB


def write_shards(folder, tensors):
    """A Hugging Face folder of four shards, written without freemerge."""
    folder.mkdir(parents=True)
    names, weight_map = sorted(tensors), {}
    for number in range(4):
        file = f"model-{number + 1:05d}-of-00004.safetensors"
        part = names[4 * number : 4 * number + 4]
        safetensors.torch.save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "own"}')


@pytest.fixture
def inputs(tmp_path):
    """Folders of a base and two fine-tuned models."""
    paths = [tmp_path / "inputs" / name for name in ("base", "a", "b")]
    for index, path in enumerate(paths):
        write_shards(path, make_model(index))
    return paths


def arguments(inputs, output, *more):
    base, *models = map(str, inputs)
    fixed = ["merge", "--base", base, "--finetuned", json.dumps(models), "--method", "TaskArithmetic"]
    return [*fixed, "--shard_size", "300KB", "--output", str(output), *more]


def everything_below(folder):
    """Path → content of every file, None for folders."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def assert_refused(tmp_path, capsys, monkeypatch, line, expected):
    """Run `python -m freemerge` in this process: one line, exit code 2, nothing changed."""
    before = everything_below(tmp_path)
    monkeypatch.setattr(sys, "argv", ["freemerge", *line])
    assert main() == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    for part in expected:
        assert str(part) in printed.err
    assert everything_below(tmp_path) == before


def shard(folder, number=3):
    return folder / f"model-{number:05d}-of-00004.safetensors"


def remove_a_shard(base, a, b):
    shard(a).unlink()
    return [shard(a), "missing", "download it"]


def name_an_absent_file(base, a, b):
    index = b / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00003-of-00004", "model-00007-of-00004"))
    return [b / "model-00007-of-00004.safetensors", "missing"]


def truncate_a_shard(base, a, b):
    data = shard(base).read_bytes()
    shard(base).write_bytes(data[: len(data) * 2 // 3])
    return [shard(base), "truncated", "download it again"]


def empty_a_shard(base, a, b):
    shard(b).write_bytes(b"")
    return [shard(b), "download it again"]


def flip_a_bit_of_a_header(base, a, b):
    data = bytearray(shard(a).read_bytes())
    data[9] ^= 0x80
    shard(a).write_bytes(data)
    return [shard(a), "download it again"]


def flip_a_bit_of_a_length(base, a, b):
    data = bytearray(shard(a).read_bytes())
    data[5] ^= 1
    shard(a).write_bytes(data)
    return [shard(a), "download it again"]


def break_an_index(base, a, b):
    index = a / "model.safetensors.index.json"
    index.write_text(index.read_text()[:-20])
    return [index, "not an index of shards"]


def put_code_into_a_pickle(base, a, b):
    class Code:
        def __reduce__(self):
            return (print, ("this must never be printed",))

    for path in a.iterdir():
        path.unlink()
    torch.save({**make_model(1), "extra": Code()}, a / "pytorch_model.bin")
    return [a / "pytorch_model.bin", "could run code"]


def put_a_value(value):
    def put(base, a, b):
        tensors = safetensors.torch.load_file(shard(b))
        tensors["layer09.weight"][7, 7] = value
        safetensors.torch.save_file(tensors, shard(b))
        return [b, "layer09.weight", "1 values that are NaN or infinite", str(value)]

    return put


def lose_a_tensor(base, a, b):
    tensors = safetensors.torch.load_file(shard(b))
    del tensors["layer09.weight"]
    safetensors.torch.save_file(tensors, shard(b))
    return [b, "layer09.weight", "no shard holds it"]


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(
    "damage",
    [
        remove_a_shard,
        name_an_absent_file,
        truncate_a_shard,
        empty_a_shard,
        flip_a_bit_of_a_header,
        flip_a_bit_of_a_length,
        break_an_index,
        put_code_into_a_pickle,
        put_a_value(float("nan")),
        put_a_value(float("-inf")),
        lose_a_tensor,
    ],
)
def test_a_broken_input_is_named_and_nothing_is_left(tmp_path, inputs, damage, output, capsys, monkeypatch):
    expected = damage(*inputs)
    assert_refused(tmp_path, capsys, monkeypatch, arguments(inputs, tmp_path / output), expected)


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_broken_input_leaves_the_old_output(tmp_path, inputs, output, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["freemerge", *arguments(inputs, tmp_path / output)])
    assert main() == 0
    capsys.readouterr()
    line = arguments(inputs, tmp_path / output, "--overwrite", "true")
    assert_refused(tmp_path, capsys, monkeypatch, line, put_a_value(float("inf"))(*inputs))


@pytest.mark.parametrize("place", ["{}", "{}/", "{}/../{name}"])
@pytest.mark.parametrize("which", [0, 1])
def test_an_output_that_is_an_input_folder_is_refused(tmp_path, inputs, which, place, capsys, monkeypatch):
    output = place.format(inputs[which], name=inputs[which].name)
    line = arguments(inputs, output, "--overwrite", "true")
    assert_refused(tmp_path, capsys, monkeypatch, line, [inputs[which].name])


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("output", ["model.safetensors", "new.safetensors", "new", "deeper/new"])
def test_an_output_inside_an_input_folder_is_refused(tmp_path, inputs, which, output, capsys, monkeypatch):
    """transformers would prefer `model.safetensors` to the shards beside it, so the input would be lost."""
    line = arguments(inputs, inputs[which] / output)
    assert_refused(tmp_path, capsys, monkeypatch, line, [inputs[which] / output])


@pytest.mark.parametrize("output", ["output/merged.safetensors", "output/merged", "output"])
def test_an_output_below_or_instead_of_a_file_is_refused(tmp_path, inputs, output, capsys, monkeypatch):
    (tmp_path / "output").write_text("not a folder")
    assert_refused(tmp_path, capsys, monkeypatch, arguments(inputs, tmp_path / output), [tmp_path / "output"])


# -- what the system refuses: in processes of their own ----------------------------------------------------------------


def run(line, file_size=None):
    """`python -m freemerge` with a limit on the size of a file, and without root's power over permissions."""
    return processes.run("-m", "freemerge", *line, file_size=file_size, obeys_permissions=True)


def assert_failed(done, *expected):
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for part in expected:
        assert str(part) in done.stderr


@linux
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_file_size_limit_is_one_line_and_leaves_nothing(tmp_path, inputs, output):
    before = everything_below(tmp_path)
    failed = run(arguments(inputs, tmp_path / output), file_size=150_000)
    assert_failed(failed, tmp_path / output, "File too large")
    assert everything_below(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of half a megabyte, if the test may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@linux
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_full_disk_is_one_line_and_leaves_nothing(small_disk, inputs, output):
    failed = run(arguments(inputs, small_disk / output))
    assert_failed(failed, small_disk / output, "No space left on device")
    assert everything_below(small_disk) == {}


@linux
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_read_only_folder_is_one_line(tmp_path, inputs, output):
    place = tmp_path / "closed"
    place.mkdir()
    place.chmod(0o555)
    before = everything_below(tmp_path)
    assert_failed(run(arguments(inputs, place / output)), place / output, "Permission denied")
    assert everything_below(tmp_path) == before


# -- kills -------------------------------------------------------------------------------------------------------------

KILLS = """
import json, os, shutil, signal, sys, time
from pathlib import Path

import torch
from freemerge.merging import TaskArithmetic, merge

torch.set_num_threads(1)
base, model, work, name = sys.argv[1:]
work = Path(work)
place = work / "place"
output = place / name

class Slow(TaskArithmetic):
    def combine(self, *arguments):
        time.sleep(0.004)  # sixteen tensors: the merge takes long enough to be killed at any moment
        return super().combine(*arguments)

def write(scale, path, method=TaskArithmetic):
    merge(base, [model], method(scale), output=path, shard_size=300_000, overwrite=True, hash_inputs=False)

def weights(path):
    files = sorted(path.glob("*.safetensors*")) if path.is_dir() else [path] if path.exists() else []
    return {file.name: file.read_bytes().hex() for file in files}

def written():
    total = 0
    for folder, _, files in os.walk(place):
        for file in files:
            try:
                total += os.stat(os.path.join(folder, file)).st_size
            except FileNotFoundError:
                pass
    return total

def kill_a_merge_at(moment):
    start = written()
    pid = os.fork()
    if pid == 0:
        try:
            write(2.0, output, Slow)
        finally:
            os._exit(0)
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if written() - start > moment * whole:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return True
    return False

states = {"absent": {}}
for state, scale in (("old", 1.0), ("new", 2.0)):
    write(scale, work / state / name)
    states[state] = weights(work / state / name)
whole = sum(map(len, states["new"].values())) // 2

for before in ("absent", "old"):
    for moment in (0, 0.3, 0.6, 0.9, 0.99):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if before == "old":
            write(1.0, output)
        killed = kill_a_merge_at(moment)
        found = weights(output)
        after = next((state for state, content in states.items() if content == found), "broken")
        visible = [path.name for path in place.iterdir() if not path.name.startswith(".")]
        write(2.0, output)
        report = {"before": before, "killed": killed, "after": after, "visible": visible}
        print(json.dumps(report | {"finally": weights(output) == states["new"], "left": os.listdir(place)}))
"""


@pytest.fixture(scope="module", params=OUTPUTS)
def kills(request, tmp_path_factory):
    """The state after each of many kills, and after the merge that follows each."""
    folder = tmp_path_factory.mktemp("kills")
    inputs = [folder / "base", folder / "model"]
    for index, path in enumerate(inputs):
        write_shards(path, make_model(index))
    done = processes.run("-c", KILLS, *inputs, folder, request.param)
    assert done.returncode == 0, done.stderr
    return request.param, [json.loads(line) for line in done.stdout.splitlines()]


@linux
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(kills):
    name, reports = kills
    assert len(reports) == 10
    assert sum(report["killed"] for report in reports) >= 5  # a busy machine may notice too late
    for report in reports:
        assert report["after"] in (report["before"], "new"), report
        assert report["visible"] == ([] if report["after"] == "absent" else [name]), report
        assert report["finally"], report


@linux
def test_the_next_merge_clears_away_what_a_killed_one_left(kills):
    name, reports = kills
    assert [report["left"] for report in reports] == [[name]] * len(reports)
