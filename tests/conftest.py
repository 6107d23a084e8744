"""Settings of all tests: no model hub, and one thread, the fastest choice for tiny models."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the processes that tests start inherit it


# Files of tests that take longest, the first one most.
_LONGEST = ("configs/test_configs.py", "test_ddp.py", "callbacks/test_distributed.py", "pipeline/test_killed_runs.py")


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
