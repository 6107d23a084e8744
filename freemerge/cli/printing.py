"""Lines on stdout and stderr that any terminal can show."""

from __future__ import annotations

import sys
from typing import NoReturn


def fail(message: str) -> NoReturn:
    """Print an error and exit with code 2."""
    print_error(message)
    sys.exit(2)


def print_error(message: object) -> None:
    """Print an error as one line on stderr, its first word in red where there is a terminal."""
    label = "\033[1;31merror:\033[0m" if sys.stderr.isatty() else "error:"
    print(label, " ".join(str(message).split()), file=sys.stderr)


def escape_what_cannot_be_printed() -> None:
    """Let stdout and stderr write escapes for characters (λ, names of files) that their encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
