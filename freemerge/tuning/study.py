"""The study: trials in a file that several processes can share, and from which an interrupted search resumes.

Optuna proposes points and stores trials. This module adds what Optuna does not do: budgets that hold over processes and
restarts, and the clean-up of trials whose process died. The file is Optuna's journal. CMA-ES stores its state in it as
a pickle, so open only files that you trust.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from filelock import FileLock

from freemerge.tuning.space import Space

_NAME = "tune"  # the name of the only study in a file

Sampler = Literal["cmaes", "tpe", "random"]
Objective = Callable[[Mapping[str, float]], "tuple[float, dict[str, Any]]"]
"""A function of a point that returns (value, details); higher values are better, details are stored as JSON."""


class Trial(NamedTuple):
    """A finished trial: a point and its value."""

    number: int
    value: float
    point: dict[str, float]
    details: dict[str, Any]
    seconds: float


class Search:
    """A search for the best point of a space.

    Args:
        path: the study's file; it is created, or the study in it is continued.
        space: the search space. The first trial is the method's own point; CMA-ES starts in the middle of the ranges.
        sampler: `cmaes` (PCB-Merging's evolutionary search; `tpe` is used for a single parameter, because CMA-ES needs
            two), `tpe` or `random`.
        seed: seed of the proposals.
        starts: further points to try first.

    Raises:
        ValueError: if Optuna or cmaes is not installed.
    """

    def __init__(
        self,
        path: Path,
        space: Space,
        sampler: Sampler = "cmaes",
        seed: int = 0,
        starts: list[dict[str, float]] | None = None,
    ) -> None:
        optuna = _optuna()
        self.space = space
        self.sampler = "tpe" if sampler == "cmaes" and len(space.parameters) == 1 else sampler
        self.seed = seed
        self._lock = FileLock(f"{path}.turn")
        self._owner = f"{socket.gethostname()}:{os.getpid()}"
        with self._lock:
            # All processes write under our lock, so a leftover lock of Optuna belongs to a killed process.
            Path(f"{path}.lock").unlink(missing_ok=True)
            with _quiet(optuna):
                self._study = optuna.create_study(
                    storage=_storage(path),
                    study_name=_NAME,
                    direction="maximize",
                    load_if_exists=True,
                    sampler=self._sampler(0),
                )
            if not self._study.get_trials(deepcopy=False):
                for point in (space.start(), *(starts or ())):
                    self._study.enqueue_trial(point, skip_if_exists=True)
        self._distributions = {
            each.name: optuna.distributions.IntDistribution(round(each.bounds.low), round(each.bounds.high))
            if each.integer
            else optuna.distributions.FloatDistribution(each.bounds.low, each.bounds.high, log=each.bounds.log)
            for each in space.parameters
        }

    def run(
        self,
        objective: Objective,
        trials: int,
        seconds: float | None = None,
        report: Callable[[Trial], None] | None = None,
    ) -> None:
        """Run trials until a budget is used up. Other processes can work on the same study at the same time.

        Args:
            objective: evaluates a point.
            trials: total number of trials of the study, including those of earlier runs and other processes.
            seconds: time limit of this call; a trial that has started is finished. None: no limit.
            report: called after each trial.
        """
        began = time.monotonic()
        while seconds is None or time.monotonic() - began < seconds:
            with self._lock:
                self._fail_dead_trials()
                known = len(self.trials())
                if known + len(_running(self._study)) >= trials:
                    return
                self._study.sampler = self._sampler(known)  # proposals depend on the finished trials, not the process
                trial = self._study.ask(self._distributions)
                trial.set_user_attr("owner", self._owner)
            asked = time.monotonic()
            value, details = objective(trial.params)
            elapsed = round(time.monotonic() - asked, 3)
            with self._lock:
                trial.set_user_attr("details", details)
                trial.set_user_attr("seconds", elapsed)
                self._study.tell(trial, value)
            if report is not None:
                report(Trial(trial.number, value, dict(trial.params), details, elapsed))

    def wait(self, poll: float = 0.5) -> None:
        """Wait until no other process is running a trial.

        For processes of other machines, the wait is limited to 10 s plus twice the longest trial, because their state
        is unknown.

        Args:
            poll: seconds between checks.
        """
        patience = time.monotonic() + 10 + 2 * max((trial.seconds for trial in self.trials()), default=0.0)
        while True:
            with self._lock:
                self._fail_dead_trials()
                owners = [trial.user_attrs.get("owner", "") for trial in _running(self._study)]
            here = any(owner.startswith(f"{socket.gethostname()}:") for owner in owners)
            if not owners or (not here and time.monotonic() > patience):
                return
            time.sleep(poll)

    def trials(self) -> list[Trial]:
        """The finished trials.

        Returns:
            Trials in the order in which they were started.
        """
        return [
            Trial(each.number, each.value, dict(each.params), each.user_attrs["details"], each.user_attrs["seconds"])
            for each in self._study.get_trials(deepcopy=False)
            if each.state.name == "COMPLETE"
        ]

    def best(self) -> Trial:
        """The best trial.

        Returns:
            The trial with the highest value; the earliest of equals.

        Raises:
            ValueError: if there is none.
        """
        trials = self.trials()
        if not trials:
            raise ValueError("tune: the time limit passed before the first trial; increase tune.seconds")
        return max(trials, key=lambda trial: (trial.value, -trial.number))

    def _fail_dead_trials(self) -> None:
        """Mark the running trials of dead processes of this machine as failed."""
        for trial in _running(self._study):
            # Trial and owner are written under one lock; without an owner, the process was killed in between.
            if _is_dead(trial.user_attrs.get("owner", f"{socket.gethostname()}:0")):
                self._study.tell(trial.number, state=_optuna().trial.TrialState.FAIL)

    def _sampler(self, known: int) -> Any:
        samplers = _optuna().samplers
        seed = self.seed * 100_003 + known
        if self.sampler == "cmaes":
            return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        if self.sampler == "tpe":
            return samplers.TPESampler(seed=seed, constant_liar=True)
        return samplers.RandomSampler(seed=seed)


def searchers(path: Path) -> list[str]:
    """The processes that are running a trial of a study.

    Args:
        path: the study's file.

    Returns:
        Names `host:pid`. Processes of this machine are alive; those of other machines may be dead.
    """
    if not path.exists():
        return []
    optuna, storage = _optuna(), _storage(path)
    if _NAME not in optuna.get_all_study_names(storage):  # the process that made the file was killed early
        return []
    running = _running(optuna.load_study(study_name=_NAME, storage=storage))
    owners = {trial.user_attrs["owner"] for trial in running if "owner" in trial.user_attrs}
    return sorted(owner for owner in owners if not _is_dead(owner))


def _storage(path: Path) -> Any:
    storages = _optuna().storages
    return storages.JournalStorage(storages.journal.JournalFileBackend(str(path)))


def _running(study: Any) -> list[Any]:
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "RUNNING"]


def _is_dead(owner: str) -> bool:
    """Whether a process belonged to this machine and has ended."""
    host, _, process = owner.rpartition(":")
    return host == socket.gethostname() and not _is_alive(int(process))


def _optuna() -> Any:
    try:
        import cmaes  # noqa: F401 - required by CmaEsSampler
        import optuna
    except ModuleNotFoundError as error:
        raise ValueError(f"tune needs {error.name}: pip install 'freemerge[tune]'") from None
    return optuna


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Suppress Optuna's message for each new study."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def _is_alive(process: int) -> bool:
    if process <= 0:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
