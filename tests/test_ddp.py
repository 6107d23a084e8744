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
from tests import processes

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "tests" / "tiny.yaml")


def test_fit_on_two_processes_reports_what_one_process_measures(tmp_path) -> None:
    """Lightning starts the second process of the fit as `python -m freemerge`; those of the test are there already.

    45 test and 37 validation samples do not divide by two ranks, so padding would show: one process, finding all stages
    done, evaluates the same files and must get the very same report.
    """
    own = ["--config", TINY, "--run.folder", str(tmp_path)]
    ddp = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = processes.run("-m", "freemerge", "fit", *own, *ddp, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "MEMBER: 2/2" in done.stderr
    assert done.stdout.count("router accuracy") == 1  # only rank 0 prints
    report = (tmp_path / "report.json").read_text()
    # Lightning's own test loop shards, and pads, by its distributed sampler.
    tested, _ = run_together(["test", *own, *ddp, "--trainer.logger", "false"], [torchrun(0), torchrun(1)])
    routed = next(row for row in json.loads(report)["rows"] if row["name"] == "FREE trained (routed)")
    for task, accuracy in routed["scores"].items():
        assert f"{task} accuracy {100 * accuracy:.1f}" in " ".join(tested[0].replace("│", " ").split())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("stage.json")}
    assert main(["fit", "--config", TINY, "--run.folder", str(tmp_path)]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("stage.json")} == before
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(report)


def torchrun(rank: int) -> dict[str, str]:
    """The environment that torchrun sets for each of two processes."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "1"}  # fmt: skip


def srun(node: int) -> dict[str, str]:
    """The environment that SLURM sets for each of two simulated nodes on this machine."""
    return {
        "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "freemerge", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2", "SLURM_NODELIST": "127.0.0.1", "SLURM_LOCALID": "0", "SLURM_PROCID": str(node),
        "SLURM_NODEID": str(node),
    }  # fmt: skip


def run_together(arguments: list[str], told: list[dict[str, str]]) -> list[tuple[str, str]]:
    """The output of each process on stdout and stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = [
        processes.Started("-m", "freemerge", *arguments, env={**os.environ, **each, "MASTER_PORT": port})
        for each in told
    ]
    printed = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0] * len(told), printed
    return printed


def test_the_slurm_script_of_the_documentation_runs_on_two_nodes(tmp_path) -> None:
    """The script's own command, twice, on two processes that act as nodes."""
    page = (ROOT / "docs" / "tutorials" / "several_devices.md").read_text()
    script = next(block for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL) if "#SBATCH" in block)
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
    printed = run_together(own, [srun(0), srun(1)])
    assert printed[0][0].count("router accuracy") == 1
    assert printed[1][0] == ""  # only the first node prints
    assert "MEMBER: 2/2" in printed[0][1] + printed[1][1]
    report = (tmp_path / "report.json").read_text()
    # No fit synchronizes the nodes here: the second must wait for the merge that the first writes.
    for stage in ("merge", "extracted"):
        shutil.rmtree(tmp_path / stage)
    run_together([*own, "--run.stages", "[merge, experts, evaluate]"], [srun(0), srun(1)])
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == json.loads(report)["rows"]


def test_a_command_leaves_no_process_group_behind(tmp_path) -> None:
    """Gloo's threads sometimes abort a process whose interpreter ends before they do."""
    watch = "import atexit, torch.distributed as d; atexit.register(lambda: print('group left:', d.is_initialized()))"
    (tmp_path / "sitecustomize.py").write_text(watch)
    own = ["--config", TINY, "--run.folder", str(tmp_path / "run"), "--run.stages", "[pretrain]"]
    done = subprocess.run(
        [sys.executable, "-m", "freemerge", "fit", *own, "--trainer.strategy", "ddp"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.getenv("PYTHONPATH")])])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "MEMBER: 1/1" in done.stderr  # there was one
    assert done.stdout.endswith("group left: False\n")
