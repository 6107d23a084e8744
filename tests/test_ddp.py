"""`fit` on two processes (gloo, CPU), through the command line as a user would start it."""

import json
import os
import re
import shlex
import shutil
import socket
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
    done = subprocess.run([*command, *ddp], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "MEMBER: 2/2" in done.stderr
    assert done.stdout.count("router accuracy") == 1  # only rank 0 prints
    report = (tmp_path / "report.json").read_text()
    command[3] = "test"  # Lightning's own test loop shards, and pads, by its distributed sampler
    tested = subprocess.run(
        [*command, *ddp, "--trainer.logger", "false"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert tested.returncode == 0, tested.stderr
    routed = next(row for row in json.loads(report)["rows"] if row["name"] == "FREE trained (routed)")
    for task, accuracy in routed["scores"].items():
        assert f"{task} accuracy {100 * accuracy:.1f}" in " ".join(tested.stdout.replace("│", " ").split())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("stage.json")}
    assert main(["fit", "--config", TINY, "--run.folder", str(tmp_path)]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("stage.json")} == before
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(report)


def start_as_srun_does(arguments: list[str], nodes: int, port: int) -> list[subprocess.Popen]:
    """Start one process per simulated node on this machine, with the environment that SLURM sets."""
    slurm = {
        "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "freemerge", "SLURM_NTASKS": str(nodes), "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": str(nodes), "SLURM_NODELIST": "127.0.0.1", "SLURM_LOCALID": "0", "MASTER_PORT": str(port),
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-m", "freemerge", *arguments],
            cwd=ROOT,
            env={**os.environ, **slurm, "SLURM_PROCID": str(node), "SLURM_NODEID": str(node)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(nodes)
    ]


def run_as_srun_does(arguments: list[str], nodes: int) -> list[tuple[str, str]]:
    """The output of each node on stdout and stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = start_as_srun_does(arguments, nodes, port)
    printed = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0] * nodes, printed
    return printed


def test_the_slurm_script_of_readme_runs_on_two_nodes(tmp_path) -> None:
    """About 40 s: the script's own command, twice, on two processes that act as nodes."""
    readme = (ROOT / "README.md").read_text()
    script = next(block for block in re.findall(r"```bash\n(.*?)```", readme, flags=re.DOTALL) if "#SBATCH" in block)
    options = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", script))
    command = shlex.split(script.replace("\\\n", " ").splitlines()[-1])
    assert command[:4] == ["srun", "python", "-m", "freemerge"]
    arguments = command[4:]
    given = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    assert given["--trainer.num_nodes"] == options["nodes"]
    assert given["--trainer.devices"] == options["ntasks-per-node"] == options["gpus-per-node"]
    # The same on this machine's CPU, one process per node.
    here = {"--config": TINY, "--trainer.num_nodes": "2", "--trainer.devices": "1", "--run.folder": str(tmp_path)}
    own = [arguments[0], *(part for pair in {**given, **here}.items() for part in pair)]
    printed = run_as_srun_does(own, nodes=2)
    assert printed[0][0].count("router accuracy") == 1
    assert printed[1][0] == ""  # only the first node prints
    assert "MEMBER: 2/2" in printed[0][1] + printed[1][1]
    report = (tmp_path / "report.json").read_text()
    # No fit synchronizes the nodes here: the second must wait for the merge that the first writes.
    for stage in ("merge", "extracted"):
        shutil.rmtree(tmp_path / stage)
    run_as_srun_does([*own, "--run.stages", "[merge, experts, evaluate]"], nodes=2)
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == json.loads(report)["rows"]


def test_a_command_leaves_no_process_group_behind(tmp_path) -> None:
    """Gloo's threads sometimes abort a process whose interpreter ends before they do."""
    watch = "import atexit, torch.distributed as d; atexit.register(lambda: print('group left:', d.is_initialized()))"
    (tmp_path / "sitecustomize.py").write_text(watch)
    own = ["--config", TINY, "--run.folder", str(tmp_path / "run"), "--run.stages", "[pretrain]"]
    done = subprocess.run(
        [sys.executable, "-m", "freemerge", "fit", *own, "--trainer.strategy", "ddp"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "MEMBER: 1/1" in done.stderr  # there was one
    assert done.stdout.endswith("group left: False\n")
