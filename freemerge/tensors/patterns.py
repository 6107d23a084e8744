"""Which tensors to merge: include and exclude patterns over names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import translate

from freemerge.errors import MergeError


def select(names: Iterable[str], include: Sequence[str] | None, exclude: Sequence[str] | None) -> list[str]:
    """The names that match some `include` pattern and no `exclude` pattern.

    Args:
        names: tensor names.
        include: globs (`*.attn.*`), or regular expressions after `re:`; a pattern has to match the whole name. None
            includes everything.
        exclude: the same; None excludes nothing.

    Returns:
        The selected names, in the given order.

    Raises:
        MergeError: a pattern is not a valid regular expression, or `include` or `exclude` is a string instead of a
            list.
    """
    included, excluded = compile_patterns(include, "include"), compile_patterns(exclude, "exclude")
    return [
        name
        for name in names
        if (include is None or any(pattern.fullmatch(name) for pattern in included.values()))
        and not any(pattern.fullmatch(name) for pattern in excluded.values())
    ]


def unmatched(names: Iterable[str], patterns: Sequence[str] | None, argument: str) -> list[str]:
    """The patterns that match none of the names; these are usually misspelt."""
    names = list(names)
    compiled = compile_patterns(patterns, argument)
    return [text for text, pattern in compiled.items() if not any(pattern.fullmatch(name) for name in names)]


def compile_patterns(patterns: Sequence[str] | None, argument: str) -> dict[str, re.Pattern[str]]:
    """Compile patterns; returns pattern text → regular expression.

    Args:
        patterns: globs and `re:` regular expressions.
        argument: the argument's name, for messages.

    Raises:
        MergeError: see `select`.
    """
    if isinstance(patterns, str):
        raise MergeError(f"{argument}= takes a list of patterns; write [{patterns!r}]")
    compiled = {}
    for text in patterns or ():
        try:
            compiled[text] = re.compile(text[3:] if text.startswith("re:") else translate(text))
        except re.error as error:
            raise MergeError(f"{argument}: '{text}' is not a valid regular expression: {error}") from None
    return compiled
