"""End a command cleanly after a signal, a closed pipe or a full disk.

Each prints one line on stderr. After a signal the exit code is the shell's own: 128 + the signal's number.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from freemerge.cli.printing import print_error


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM)."""


def run_to_end(command: Callable[[], int]) -> int:
    """Run a command and turn signals and unwritable output into exit codes.

    Args:
        command: prints its own errors and returns its exit code.

    Returns:
        The exit code: the command's own; 130 after Ctrl-C, 143 after SIGTERM, 2 if its output cannot be written.
    """
    try:
        code = command()
        sys.stdout.flush()
        return code
    except Terminated:
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        _give_up_stdout()
        print_error("the output was not read to its end (closed pipe)")
        return 2
    except OSError as error:
        if error.filename is not None or not (_is_broken(sys.stdout) or _is_our_own(error)):
            raise
        _give_up_stdout()
        print_error(f"the output cannot be written: {error.strerror}")
        return 2


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Inside the block, SIGTERM ends the command as cleanly as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield
        return

    def end(*_: Any) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_broken(stream: Any) -> bool:
    try:
        stream.flush()
    except OSError:
        return True
    return False


def _is_our_own(error: OSError) -> bool:
    """Whether freemerge.cli raised the error; if stdout is unbuffered, flushing it later does not fail again."""
    return raised_in(error).startswith("freemerge.cli")


def raised_in(error: BaseException) -> str:
    """The name of the module that raised an error; "" if it has not been raised."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return "" if last is None else last.tb_frame.f_globals.get("__name__", "")


def _give_up_stdout() -> None:
    """Redirect stdout to the null device, so that Python's flush at exit succeeds."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
