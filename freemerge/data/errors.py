"""Faults of data: what is wrong with a file, a row or a sample, in one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from freemerge.errors import one_line

_MARK = "DataError: "


class DataError(ValueError):
    """Data that cannot be used. The message names the file, row or sample, what is wrong and what to do.

    torch raises an error of a loader's worker process anew, with the worker's whole traceback as its message. Of that,
    the line that matters is kept.

    Args:
        message: one line.
    """

    def __init__(self, message: str) -> None:
        if message.startswith("Caught DataError in"):
            message = message.rstrip().rpartition(_MARK)[2]
        super().__init__(one_line(message))


class DataWarning(UserWarning):
    """Something about data that is worth knowing, and stops nothing."""


def raised_here(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches; a DataError is raised from here, without torch's frames.

    These would keep the iterator alive in a cycle, and the garbage collector would then wait for each worker process
    until five seconds are over.
    """
    try:
        yield from batches
        return
    except DataError as error:
        fault = DataError(str(error))
        fault.__cause__ = error.__cause__
        error.__traceback__ = None
    del batches
    try:
        raise fault
    finally:
        del fault  # whose traceback holds this frame


def reason_of(error: BaseException) -> str:
    """An error's message in one line; its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def listed(names: Sequence[object], most: int = 5) -> str:
    """The first few of some names, with commas."""
    return ", ".join(map(str, names[:most])) + (f", … ({len(names)} in all)" if len(names) > most else "")
