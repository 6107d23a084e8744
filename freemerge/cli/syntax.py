"""Advice in the syntax of where it is read.

The library says what to do in Python, `exclude=['head.*']`. On the command line the same advice is an option,
`--exclude '[head.*]'`: one sentence in the library, translated here.
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
    """A message with options for keyword arguments.

    Args:
        message: of the library.
        names: of the keyword arguments that are options of the command; others stay as they are.

    Returns:
        The message, with `overwrite=True` as `--overwrite` and `exclude=['a', 'b']` as `--exclude '[a, b]'`.
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
