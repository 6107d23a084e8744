"""Runs `fit` and kills it at random moments, again and again, until it comes to its end.

    python tests/pipeline/killed.py KILLS SEED fit --config … --run.folder …

Prints how often it was killed. The imports are done once: each attempt is a fork.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from typing import ClassVar

import torch
import transformers.models.vit.modeling_vit  # noqa: F401 - here, and not in each attempt, which would die importing

import freemerge.cli.suite  # noqa: F401
from freemerge.cli import main
from freemerge.data import ArrayDataset, Task
from freemerge.data.augment import RandomAffine
from tests.tiny import TinySuite


class AugmentedSuite(TinySuite):
    """Whose training images are shifted at random, which draws from torch's global generator."""

    TASKS: ClassVar[tuple[str, ...]] = TinySuite.TASKS

    def build(self, name: str) -> Task:
        task = super().build(name)
        train = ArrayDataset(task.train.images, task.train.labels, 0.5, 0.5, augment=RandomAffine(shift=0.1))
        return Task(name, task.class_names, train, task.val, task.test)


def attempt(arguments: list[str], seconds: float | None) -> int | None:
    """One fit, killed after so many seconds; its exit code, or None if it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = main(arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if end is not None and time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.005)


def run(kills: int, seed: int, arguments: list[str], longest: float = 2.0) -> tuple[int, int]:
    """How often it was killed, and the exit code."""
    torch.set_num_threads(1)
    chance = random.Random(seed)
    for count in range(kills):
        code = attempt(arguments, 0.3 + chance.random() * longest)
        if code is not None:
            return count, code
    return kills, attempt(arguments, None)


if __name__ == "__main__":
    count, code = run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    print(f"killed {count} times")
    sys.exit(code)
