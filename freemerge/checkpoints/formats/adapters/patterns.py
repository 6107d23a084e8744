"""Patterns of module names, as PEFT matches them, in bounded time.

An adapter's configuration may hold regular expressions, and one that backtracks without end would hang whoever reads
it. Those that cannot repeat anything are matched as they are; the others by a matcher that stops.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable

from freemerge.errors import CheckpointError

_SECONDS = 5.0  # for all modules of an adapter; what is sane takes microseconds
_LONGEST = 100_000  # characters of a pattern
_REPEATS = re.compile(r"[*+?{(\\]")


class PatternMatcher:
    """Finds the first of some patterns that fits a module's name.

    Args:
        patterns: regular expressions, in their order.
        what: where they come from, for messages.
        whole: whether a pattern has to fit the whole name; otherwise, as PEFT does it, the end of the name from a dot.

    Raises:
        CheckpointError: a pattern is no regular expression.
    """

    def __init__(self, patterns: Iterable[str], what: str, whole: bool = False) -> None:
        self._what = what
        self._left = _SECONDS
        self._patterns = {pattern: self._compile(pattern, whole) for pattern in patterns}

    def find(self, name: str) -> str | None:
        """The first pattern that fits, or None.

        Raises:
            CheckpointError: matching takes too long.
        """
        for pattern, match in self._patterns.items():
            start = time.monotonic()
            try:
                if match(name, self._left):
                    return pattern
            except (TimeoutError, RecursionError, MemoryError):
                self._left = 0.0
            self._left -= time.monotonic() - start
            if self._left <= 0:
                raise CheckpointError(
                    f"{self._what}: matching the pattern '{_shortened(pattern)}' with the names of modules takes more "
                    f"than {_SECONDS:g} s; write the names of the modules instead"
                )
        return None

    def _compile(self, pattern: str, whole: bool) -> Callable[[str, float], object]:
        if len(pattern) > _LONGEST:
            raise CheckpointError(f"{self._what}: has a pattern of {len(pattern):,} characters, expected a module name")
        expression = f"(?:{pattern})\\Z" if whole else rf"(.*\.)?({pattern})$"
        try:
            compiled = re.compile(expression)
        except (re.error, RecursionError, OverflowError, MemoryError) as error:
            raise self._broken(pattern, error) from None
        if not _REPEATS.search(pattern):
            return lambda name, seconds: compiled.match(name)
        import regex  # comes with transformers; the standard library's matcher cannot be stopped

        try:
            bounded = regex.compile(expression)
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise self._broken(pattern, error) from None
        return lambda name, seconds: bounded.match(name, timeout=seconds)

    def _broken(self, pattern: str, error: Exception) -> CheckpointError:
        reason = getattr(error, "msg", None) or str(error) or type(error).__name__
        return CheckpointError(f"{self._what}: '{_shortened(pattern)}' is no regular expression ({reason}); correct it")


def _shortened(pattern: str) -> str:
    return pattern if len(pattern) <= 80 else pattern[:77] + "…"
