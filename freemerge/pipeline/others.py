"""Further processes of the same command: one for each device after the first."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence


class Others:
    """Processes that run `python -m freemerge`, and end when this process ends.

    Args:
        commands: the arguments of each process.
    """

    def __init__(self, commands: Sequence[Sequence[str]]) -> None:
        self.commands = [list(command) for command in commands]
        self._running: list[subprocess.Popen] = []

    def start(self) -> None:
        """Start the processes."""
        self._running = [subprocess.Popen([sys.executable, "-m", "freemerge", *each]) for each in self.commands]

    def join(self) -> None:
        """Wait for all processes; if this process is interrupted, end them.

        Raises:
            ValueError: one of them failed; it has printed why on stderr.
        """
        try:
            codes = [process.wait() for process in self._running]
        finally:
            self.stop()
        if any(codes):
            raise ValueError(f"tune: a process of another device ended with exit code {next(filter(None, codes))}")

    def stop(self) -> None:
        """End the processes that still run."""
        for process in self._running:
            if process.poll() is None:
                process.terminate()
                process.wait()
        self._running = []
