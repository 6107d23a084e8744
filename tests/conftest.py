"""Settings of all tests: no model hub, and one thread, the fastest choice for tiny models."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the processes that tests start inherit it


def pytest_xdist_setupnodes() -> None:
    """The controller makes the workers' warnings again, in a thread for each worker; transformers' lazy modules do not
    bear being imported by two threads at once, so the classes are imported before."""
    import peft  # noqa: F401
