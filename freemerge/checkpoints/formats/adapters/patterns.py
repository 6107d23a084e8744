"""Module name patterns, matched like PEFT in bounded time.

An adapter's configuration may hold regular expressions, and one with catastrophic backtracking would hang the reader.
Patterns without repetition are matched by `re`, all others by a matcher with a time limit.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable

from freemerge.errors import CheckpointError

_SECONDS = 5.0  # seconds for all modules of an adapter; ordinary patterns take microseconds
_LONGEST = 100_000  # length limit of a pattern, in characters
_REPEATS = re.compile(r"[*+?{(\\]")


class PatternMatcher:
    """Finds the first pattern that matches a module's name.

    Args:
        patterns: regular expressions, in order.
        what: their origin, for messages.
        whole: whether a pattern has to match the whole name; otherwise, as in PEFT, the end of the name from a dot on.

    Raises:
        CheckpointError: a pattern is not a valid regular expression.
    """

    def __init__(self, patterns: Iterable[str], what: str, whole: bool = False) -> None:
        self._what = what
        self._left = _SECONDS
        self._patterns = {pattern: self._compile(pattern, whole) for pattern in patterns}

    def find(self, name: str) -> str | None:
        """The first pattern that matches, or None.

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
        import regex  # installed with transformers; the standard library's matcher has no time limit

        try:
            bounded = regex.compile(expression)
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise self._broken(pattern, error) from None
        return lambda name, seconds: bounded.match(name, timeout=seconds)

    def _broken(self, pattern: str, error: Exception) -> CheckpointError:
        reason = getattr(error, "msg", None) or str(error) or type(error).__name__
        return CheckpointError(
            f"{self._what}: '{_shortened(pattern)}' is not a regular expression ({reason}); correct it"
        )


def _shortened(pattern: str) -> str:
    return pattern if len(pattern) <= 80 else pattern[:77] + "…"
