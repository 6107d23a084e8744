"""Translate advice in error messages from Python's syntax to the command line's.

The library's messages name keyword arguments, `exclude=['head.*']`. On the command line the same advice is the option
`--exclude '[head.*]'`.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterable

from freemerge.cli.yaml_text import in_brackets

_STRING = r"'[^']*'|\"[^\"]*\""
_VALUE = rf"\[…\]|\[(?:(?:{_STRING})(?:, )?)+(?:, …)?\]|{_STRING}|True|False|None|-?\d+(?:\.\d+)?(?![\w.])|…|(?= |$)"


def as_options(message: str, names: Iterable[str]) -> str:
    """Replace keyword arguments in a message with command-line options.

    Args:
        message: a message of the library.
        names: the keyword arguments that are options of the command; others are left unchanged.

    Returns:
        The message, with `--overwrite` for `overwrite=True` and `--exclude '[a, b]'` for `exclude=['a', 'b']`.
    """
    known = "|".join(map(re.escape, names))
    return re.sub(rf"(?<![\w.'\"/=-])({known})=({_VALUE})", lambda found: _option(found[1], found[2]), message)


def _option(name: str, value: str) -> str:
    if value in ("", "True"):
        return f"--{name}"
    if value in ("[…]", "…"):
        return f"--{name} '[…]'" if value == "[…]" else f"--{name} …"
    more = value.endswith(", …]")
    found = ast.literal_eval(value.replace(", …]", "]"))
    if isinstance(found, list):
        text = in_brackets(found)
        return f"--{name} {shlex.quote(text[:-1] + ', …]' if more else text)}"
    if isinstance(found, str):
        return f"--{name} {shlex.quote(found)}"
    return f"--{name} {'null' if found is None else str(found).lower()}"
