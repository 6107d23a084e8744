"""Print messages on stdout and stderr so that any terminal can show them."""

from __future__ import annotations

import sys
from typing import NoReturn


def fail(message: str) -> NoReturn:
    """Print an error and exit with code 2."""
    print_error(message)
    sys.exit(2)


def print_error(message: object) -> None:
    """Print an error as one line on stderr, with its first word in red on a terminal."""
    label = "\033[1;31merror:\033[0m" if sys.stderr.isatty() else "error:"
    print(label, " ".join(str(message).split()), file=sys.stderr)


def escape_what_cannot_be_printed() -> None:
    """Let stdout and stderr escape characters (such as λ) that their encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
