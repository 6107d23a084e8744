"""The output of the commands on finished checkpoints: notes, a progress bar, one-line errors."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from freemerge.checkpoints import CheckpointError
from freemerge.cli.options import options
from freemerge.cli.parsing import OneLineErrors
from freemerge.cli.syntax import as_options
from freemerge.merging import MergeError, MergeWarning

FAILURES = (MergeError, CheckpointError, ValueError, OSError, MemoryError, torch.OutOfMemoryError)
"""The errors that end a command with one line and exit code 2."""


def describe(error: Exception, parser: OneLineErrors) -> str:
    """The message of an error, in the syntax of the command line.

    Args:
        error: one of `FAILURES`.
        parser: the command's parser, whose options replace keyword arguments.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return f"there is not enough memory: {str(error).split('. ')[0]}"
    if isinstance(error, UnicodeEncodeError):
        return f"'{error.object!s}' cannot be written in this locale's encoding ({error.encoding}); set PYTHONUTF8=1"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return in_options(str(error), parser)


def in_options(message: str, parser: OneLineErrors) -> str:
    """A message with the command's options in place of keyword arguments."""
    return as_options(message, options(parser))


@contextmanager
def notes(parser: OneLineErrors) -> Iterator[None]:
    """Inside the block, print a merge's warnings as one-line notes; other warnings are shown as usual."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", MergeWarning)
        show = warnings.showwarning

        def show_note(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, MergeWarning):
                print("note:", " ".join(in_options(str(message), parser).split()), file=sys.stderr)
            else:
                show(message, category, *where, **more)

        warnings.showwarning = show_note
        yield


@contextmanager
def bar(label: str, visible: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar of the bytes read, with the remaining time; None if it is not visible.

    Args:
        label: name of the work.
        visible: whether stderr is a terminal.
    """
    if not visible:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
