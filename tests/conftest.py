"""Settings of all tests: no model hub, and one thread, the fastest choice for tiny models."""

import gc
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the processes that tests start inherit it

gc.disable()  # until all tests are collected: what they import stays


def pytest_collection_finish() -> None:
    """Collect garbage from now on, but never go through what was imported: 600 000 objects, 0.2 seconds each time."""
    collect_from_now_on()


def collect_from_now_on() -> None:
    """The same, for the controller of the workers too, which collects no tests."""
    gc.freeze()
    gc.enable()


# Files of tests that take longest, the first one most.
_LONGEST = (
    "configs/test_configs.py",
    "test_ddp.py",
    "callbacks/test_distributed.py",
    "pipeline/test_killed_runs.py",
    "cli/test_suite_command.py",
    "cli/test_runs.py",
    "cli/test_parsing.py",
    "cli/test_ending.py",
    "cli/test_tune_command.py",
    "quickstart/test_base.py",
    "merging/engine/test_distributed.py",
    "merging/engine/test_robustness.py",
    "checkpoints/test_hub.py",
    "quickstart/test_suite.py",
    "cli/test_problems.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files begin first: a process that began one of them last would end long after the others."""

    def place(item: pytest.Item) -> int:
        name = item.nodeid.partition("::")[0].removeprefix("tests/")
        return _LONGEST.index(name) if name in _LONGEST else len(_LONGEST)

    items.sort(key=place)


def pytest_xdist_setupnodes() -> None:
    """The controller makes the workers' warnings again, in a thread for each worker; transformers' lazy modules do not
    bear being imported by two threads at once, so the classes are imported before."""
    import peft  # noqa: F401

    collect_from_now_on()
