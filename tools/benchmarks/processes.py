"""Whole processes, measured: wall and CPU seconds, and peak memory without the page cache.

Peak memory is the largest sum of RssAnon and RssShmem in `/proc/<pid>/status`: pages that the process has written and
that the kernel cannot drop. It is not `ru_maxrss` or VmHWM: these count the mapped pages of files as well, so that a
program that maps its inputs would be charged for the page cache, and `ru_maxrss` is even inherited from the process
that started this one. The kernel keeps no high-water mark of the anonymous part, so it is sampled, every 2 ms; in that
time a core can touch a few MiB of new pages at most, which bounds what a sample can miss.

Runs are interleaved: every round runs each job once, so that a disturbance affects all jobs alike, and medians are
taken over rounds. Before each run, outside its time, the last output is removed and dirty pages are written back
(sync), so that no run pays for the writes of another.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).resolve().parent / "programs"
_INTERVAL = 0.002  # seconds between samples


class Usage(NamedTuple):
    """The resources of one run, or the median of several."""

    wall: float  # seconds from the start of the process to its end
    cpu: float  # CPU seconds of all its threads, in user and kernel mode
    peak: float  # bytes
    printed: str  # what it wrote to stdout
    started: float  # `time.monotonic()` at its start


@dataclass(frozen=True)
class Job:
    """A process to measure.

    Args:
        command: the program and its arguments.
        output: what it writes; removed before each run.
        before: called before each run, outside its time.
        environment: over that of this process.
    """

    command: Sequence[str]
    output: Path | None = None
    before: Callable[[], object] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def program(name: str, *arguments: str | os.PathLike[str], python: str = sys.executable) -> list[str]:
    """The command that runs one of `benchmarks/programs`."""
    return [python, str(PROGRAMS / f"{name}.py"), *map(str, arguments)]


def confine(cores: int) -> None:
    """Restrict this process and its children to a number of cores, with as many threads."""
    available = sorted(os.sched_getaffinity(0))
    if len(available) < cores:
        raise SystemExit(f"error: there are {len(available)} cores, not {cores}; give --cores {len(available)}")
    os.sched_setaffinity(0, available[:cores])
    os.environ["OMP_NUM_THREADS"] = str(cores)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    os.environ["HF_HUB_OFFLINE"] = "1"


def run_once(job: Job) -> Usage:
    """Run a job and measure it.

    Raises:
        SystemExit: it failed; the message ends with what it wrote to stderr.
    """
    if job.output is not None:
        remove(job.output)
    if job.before is not None:
        job.before()
    os.sync()
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as errors:
        started = time.monotonic()
        process = subprocess.Popen(
            list(map(str, job.command)), stdout=printed, stderr=errors, env=os.environ | job.environment
        )
        peak = 0
        while True:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, _resident(process.pid))
            time.sleep(_INTERVAL)
        wall = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)  # waited for already
        printed.seek(0)
        errors.seek(0)
        if process.returncode:
            shown = " ".join(str(part)[:200] for part in job.command)
            raise SystemExit(f"error: {shown}\nended with exit code {process.returncode}:\n{errors.read()[-4000:]}")
        return Usage(wall, used.ru_utime + used.ru_stime, peak, printed.read(), started)


def run_all(jobs: Mapping[str, Job], repeat: int) -> dict[str, list[Usage]]:
    """Run all jobs `repeat` times, interleaved; prints progress on stderr and keeps the last outputs."""
    found: dict[str, list[Usage]] = {name: [] for name in jobs}
    for turn in range(repeat):
        for name, job in jobs.items():
            _say(f"run {turn + 1} of {repeat}: {name}")
            found[name].append(run_once(job))
    _say("")
    return found


def median(runs: Sequence[Usage]) -> Usage:
    """Medians of the times and the largest of the peaks, because sampling can only underestimate a peak."""
    middle = sorted(runs, key=lambda usage: usage.wall)[len(runs) // 2]
    return Usage(
        statistics.median(usage.wall for usage in runs),
        statistics.median(usage.cpu for usage in runs),
        max(usage.peak for usage in runs),
        middle.printed,
        middle.started,
    )


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def drop_from_cache(files: Sequence[Path]) -> None:
    """Drop the kernel's cached pages of files. A hypervisor's own cache is not affected."""
    os.sync()  # dirty pages cannot be dropped
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def read_into_cache(files: Sequence[Path]) -> None:
    """Read files once, so that later reads find them in the page cache."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def high_water() -> float:
    """Largest resident set of this process in MiB, mapped files included, without that of its parent."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024


def _resident(pid: int) -> int:
    """RssAnon + RssShmem of a process in bytes; 0 if it has just ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    total = 0
    for line in text.splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            total += 1024 * int(line.split()[1])
    return total


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)
