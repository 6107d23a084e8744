"""Suggest the right name for a wrong one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

_WRAPPER = "Dare"  # drops entries, then passes the task vectors to another method
_LINEAR = "TaskArithmetic"  # the class for what other tools call `linear`


def closest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the known name closest to a wrong one; "" if none is close.

    Capitals and separators are ignored: pcb-merging matches PCBMerging.
    """
    plain = {_plain(other): other for other in known}
    near = get_close_matches(_plain(name), plain, n=1, cutoff=0.65)
    return f"; did you mean '{plain[near[0]]}'?" if near else ""


def unknown_option(option: str, keys: Iterable[str]) -> str:
    """The error message for an unknown option.

    Args:
        option: the option as typed, with its dashes.
        keys: the keys of the known options.
    """
    return f"there is no option '{option}'{closest(option, [f'--{key}' for key in keys])}"


def combination(name: str, known: Iterable[str], key: str) -> str:
    """Translate another tool's name for two methods in one, such as `dare_ties`; "" for other names.

    Args:
        name: the given class name.
        known: names of the known classes.
        key: key of the option that the class was given for.
    """
    plain = {re.sub("(?:merging|merge)$", "", _plain(other)): other for other in known}
    parts = [_LINEAR if part == "linear" else plain.get(part) for part in re.split(r"[\W_]+", name.lower())]
    if len(parts) != 2 or None in parts or not set(parts) <= set(plain.values()):
        return ""
    first, second = parts
    if first != _WRAPPER:
        return f"; {first} and {second} are two separate methods"
    return (
        f"; did you mean --{key} {first} --{key}.method {second}? In a file: "
        f"{key.rpartition('.')[2]}: {{class_path: {first}, init_args: {{method: {second}}}}}"
    )


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()
