"""Errors and warnings about data: one line that names the file, row or sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from freemerge.errors import one_line

_MARK = "DataError: "


class DataError(ValueError):
    """Data that cannot be used. The message names the file, row or sample, what is wrong and what to do.

    When a worker process of a loader fails, torch raises the error again in the main process with the worker's whole
    traceback as its message; only the error's own line is kept.

    Args:
        message: one line.
    """

    def __init__(self, message: str) -> None:
        if message.startswith("Caught DataError in"):
            message = message.rstrip().rpartition(_MARK)[2]
        super().__init__(one_line(message))


class DataWarning(UserWarning):
    """A possible problem with data that does not stop the run."""


def reraise_data_errors(batches: Iterator[Any]) -> Iterator[Any]:
    """Iterate over batches, and raise a DataError anew without torch's stack frames.

    Those frames would keep the loader's iterator alive in a reference cycle, and the garbage collector would then wait
    five seconds for each worker process.

    Args:
        batches: the iterator of a DataLoader.

    Yields:
        The batches, unchanged.

    Raises:
        DataError: with the same message and cause as the original.
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
        del fault  # its traceback refers to this frame: without this, a reference cycle


def reason_of(error: BaseException) -> str:
    """An error's message in one line.

    Args:
        error: any exception.

    Returns:
        Its message without line breaks, or its class name if the message is empty.
    """
    return " ".join(str(error).split()) or type(error).__name__


def listed(names: Sequence[object], most: int = 5) -> str:
    """Join the first few names with commas.

    Args:
        names: any objects; written by `str`.
        most: how many of them to write.

    Returns:
        For instance `a, b, … (7 in all)`.
    """
    return ", ".join(map(str, names[:most])) + (f", … ({len(names)} in all)" if len(names) > most else "")
