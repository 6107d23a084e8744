"""The study: finding the best point, budgets, resuming after a kill, and several processes."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from freemerge.merging import PCBMerging, TaskArithmetic, Ties
from freemerge.tuning import Range, Search, Space, default_ranges, searchers

ROOT = Path(__file__).parent.parent.parent
TASKS = ("a", "b", "c")


def space() -> Space:
    method = TaskArithmetic(0.5)
    return Space(method, TASKS, default_ranges(method))


def hill(point) -> tuple[float, dict]:
    """Highest at 0.2, 0.5, 0.9."""
    best = {"scale/a": 0.2, "scale/b": 0.5, "scale/c": 0.9}
    return -sum((point[name] - value) ** 2 for name, value in best.items()), {"kept": True}


@pytest.mark.parametrize("sampler", ["cmaes", "tpe", "random"])
def test_the_search_finds_a_maximum(tmp_path, sampler) -> None:
    search = Search(tmp_path / "study.journal", space(), sampler, seed=0)
    search.run(hill, trials=80)
    trials = search.trials()
    assert len(trials) == 80
    assert trials[0].point == space().start()  # the first trial has the method's own values
    assert trials[0].details == {"kept": True}
    best = search.best()
    assert best.value == max(trial.value for trial in trials)
    assert best.value > {"cmaes": -2e-3, "tpe": -2e-2, "random": -0.1}[sampler]


def test_the_seed_determines_the_search(tmp_path) -> None:
    found = []
    for name, seed in (("1", 0), ("2", 0), ("3", 1)):
        search = Search(tmp_path / name, space(), "cmaes", seed)
        search.run(hill, trials=15)
        found.append([trial.point for trial in search.trials()])
    assert found[0] == found[1]
    assert found[0][1:] != found[2][1:]


def test_a_search_resumes(tmp_path) -> None:
    whole = Search(tmp_path / "whole", space(), "cmaes", 0)
    whole.run(hill, trials=20)
    for trials in (7, 7, 20):
        part = Search(tmp_path / "parts", space(), "cmaes", 0)
        part.run(hill, trials)
    assert [trial.point for trial in part.trials()] == [trial.point for trial in whole.trials()]


def test_the_time_limit_ends_a_search(tmp_path) -> None:
    search = Search(tmp_path / "study", space(), "random")
    search.run(lambda point: (time.sleep(0.05), hill(point))[1], trials=1000, seconds=0.5)
    assert 1 <= len(search.trials()) <= 11
    nothing = Search(tmp_path / "nothing", space(), "random")
    nothing.run(hill, trials=5, seconds=0)
    with pytest.raises(ValueError, match=r"the time limit passed before the first trial; increase tune\.seconds"):
        nothing.best()


def test_one_parameter_is_searched_with_tpe_and_integers_stay_integers(tmp_path) -> None:
    ties = Space(Ties(), TASKS, {"density": Range(0.01, 1.0, log=True)})
    search = Search(tmp_path / "1", ties, "cmaes")
    assert search.sampler == "tpe"
    search.run(lambda point: (-abs(point["density"] - 0.3), {}), trials=40)
    assert search.best().point["density"] == pytest.approx(0.3, abs=0.05)
    assert len({trial.point["density"] for trial in search.trials()}) > 30


def test_further_starts_are_tried_first(tmp_path) -> None:
    pcb = Space(PCBMerging(), TASKS, {"scale": Range(0, 2), "ratio": Range(0.01, 1)})
    search = Search(tmp_path / "s", pcb, starts=[{"scale": 0.3, "ratio": 0.1}])
    search.run(lambda point: (point["scale"], {}), trials=2)
    assert [trial.point for trial in search.trials()] == [{"scale": 1.0, "ratio": 0.1}, {"scale": 0.3, "ratio": 0.1}]


SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.tuning.test_study import Search, hill, space
def slow(point):
    time.sleep({pause})
    return hill(point)
search = Search(Path({path!r}), space(), "cmaes")
print("ready", flush=True)
search.run(slow, trials={trials}, report=lambda trial: print(trial.number, flush=True))
search.wait()
"""


def start(path: Path, trials: int, pause: float) -> subprocess.Popen:
    script = SCRIPT.format(root=str(ROOT), path=str(path), trials=trials, pause=pause)
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


def test_two_processes_share_a_study_and_its_budget(tmp_path) -> None:
    """About 10 s: both import torch."""
    processes = [start(tmp_path / "study", 20, 0.1) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    numbers = [[int(line) for line in process.stdout] for process in processes]
    assert [process.wait() for process in processes] == [0, 0]
    assert all(numbers)
    assert sorted(numbers[0] + numbers[1]) == list(range(20))  # every trial once, and no more than the budget
    assert len(Search(tmp_path / "study", space(), "cmaes").trials()) == 20


def test_running_processes_are_listed(tmp_path) -> None:
    path = tmp_path / "study"
    assert searchers(path) == []
    path.touch()  # a process was killed before it made the study
    assert searchers(path) == []
    killed = start(path, 1000, 60.0)
    assert killed.stdout.readline() == "ready\n"
    while not (found := searchers(path)):
        time.sleep(0.05)
    assert found == [f"{socket.gethostname()}:{killed.pid}"]
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert searchers(path) == []


def test_a_killed_process_loses_only_its_own_trial(tmp_path) -> None:
    killed = start(tmp_path / "study", 1000, 0.2)
    assert [killed.stdout.readline() for _ in range(4)] == ["ready\n", "0\n", "1\n", "2\n"]
    time.sleep(0.05)  # during the next trial
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    search = Search(tmp_path / "study", space(), "cmaes")
    before = search.trials()
    assert len(before) == 3
    search.run(hill, trials=6)
    search.wait()
    after = search.trials()
    assert after[:3] == before
    assert len(after) == 6
