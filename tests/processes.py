"""Programs in processes of their own, forked from a server that has imported the large packages.

A program that imports Lightning computes for six seconds before it does anything of its own, and the tests start dozens
of them. The server imports what others wrote and nothing of freemerge; it has computed nothing and has no threads.
What depends on how an interpreter starts or ends (its locale, `sitecustomize`, `atexit`, the large packages that it
imports) is tested with `subprocess` instead.
"""

from __future__ import annotations

import ctypes
import io
import multiprocessing
import os
import resource
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]


def forkserver() -> Any:
    """The context of processes that begin with the large packages imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.large_packages"])
    return context


class Started:
    """A program that runs; like `subprocess.Popen` with both outputs piped.

    Args:
        words: what would follow `python`: `-m MODULE`, `-c CODE` or the path of a file, then its arguments.
        cwd: the working folder.
        env: the environment; None for this process's.
        file_size: how large a file of it may become, in bytes; None for no limit.
        obeys_permissions: whether it obeys the permissions of files as others do, though it is root's.
    """

    def __init__(
        self,
        *words: str | Path,
        cwd: str | Path = ROOT,
        env: Mapping[str, str] | None = None,
        file_size: int | None = None,
        obeys_permissions: bool = False,
    ) -> None:
        self.args = [sys.executable, *map(str, words)]
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        for path in self._outputs:
            path.touch()
        environment = dict(os.environ if env is None else env)
        limits = (file_size, obeys_permissions)
        given = (self.args[1:], str(cwd), environment, list(map(str, self._outputs)), limits)
        self._process = forkserver().Process(target=_run, args=given)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """As of `subprocess.Popen`: negative if a signal ended it, None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self._process.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for its end; what it printed on stdout and on stderr."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutExpired(self.args, timeout, *(path.read_bytes() for path in self._outputs))
        out, err = (path.read_text(encoding="utf-8") for path in self._outputs)
        self._folder.cleanup()
        return out, err

    def finish(self, timeout: float = 300) -> CompletedProcess[str]:
        """Wait for its end."""
        out, err = self.communicate(timeout)
        return CompletedProcess(self.args, self._process.exitcode, out, err)


def run(*words: str | Path, timeout: float = 300, **how: Any) -> CompletedProcess[str]:
    """Run a program to its end; see `Started`."""
    return Started(*words, **how).finish(timeout)


def _run(
    words: list[str], cwd: str, environment: dict[str, str], outputs: list[str], limits: tuple[int | None, bool]
) -> None:
    """What the new process does: become what `python words…` would be, and run that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    os.chdir(cwd)
    sys.stdout, sys.stderr = _redirect(1, outputs[0]), _redirect(2, outputs[1])
    kind, *rest = words
    first = {"-m": cwd, "-c": ""}.get(kind, os.path.dirname(os.path.abspath(kind)))
    paths = [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = [first, *paths, *filter(None, sys.path)]
    _limit(*limits)
    if kind == "-m":
        sys.argv[:] = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv[:] = ["-c", *rest[1:]]
        sys.modules["__main__"] = program = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), program.__dict__)
    else:
        sys.argv[:] = words
        runpy.run_path(kind, run_name="__main__")


def _limit(file_size: int | None, obeys_permissions: bool) -> None:
    """See `Started`."""
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if obeys_permissions:
        library, version, dac_override = ctypes.CDLL(None), 0x20080522, 1
        this_process, sets = (ctypes.c_uint32 * 2)(version, 0), (ctypes.c_uint32 * 6)()
        assert library.capget(this_process, sets) == 0
        sets[0] &= ~(1 << dac_override)  # the first word is the lower half of the effective capabilities
        assert library.capset(this_process, sets) == 0


def _redirect(number: int, path: str) -> io.TextIOWrapper:
    """Let a file descriptor of the process be a file, and return it as the text stream that Python makes of it."""
    opened = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.dup2(opened, number)
    os.close(opened)
    return io.TextIOWrapper(open(number, "wb", closefd=False), encoding="utf-8", line_buffering=number == 2)
