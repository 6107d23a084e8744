"""The right name for a wrong one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

_WRAPPER = "Dare"  # takes another method to hand the thinned task vectors on to
_LINEAR = "TaskArithmetic"  # what a sum of task vectors is called here


def closest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the known name that is most like a wrong one; nothing if none is.

    Capitals and separators count for nothing: pcb-merging means PCBMerging.
    """
    plain = {_plain(other): other for other in known}
    near = get_close_matches(_plain(name), plain, n=1, cutoff=0.65)
    return f"; did you mean '{plain[near[0]]}'?" if near else ""


def unknown_option(option: str, keys: Iterable[str]) -> str:
    """The error for an option that there is not.

    Args:
        option: as it was typed, with its dashes.
        keys: the keys of the options that there are.
    """
    return f"there is no option '{option}'{closest(option, [f'--{key}' for key in keys])}"


def combination(name: str, known: Iterable[str], key: str) -> str:
    """What other tools' name of two merging methods in one, such as `dare_ties`, is here; nothing for other names.

    Args:
        name: that was given for a class.
        known: the classes there are.
        key: of the option that the class was given for.
    """
    plain = {re.sub("(?:merging|merge)$", "", _plain(other)): other for other in known}
    parts = [_LINEAR if part == "linear" else plain.get(part) for part in re.split(r"[\W_]+", name.lower())]
    if len(parts) != 2 or None in parts or not set(parts) <= set(plain.values()):
        return ""
    first, second = parts
    if first != _WRAPPER:
        return f"; {first} and {second} are methods of their own"
    return (
        f"; did you mean --{key} {first} --{key}.method {second}? In a file: "
        f"{key.rpartition('.')[2]}: {{class_path: {first}, init_args: {{method: {second}}}}}"
    )


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()
